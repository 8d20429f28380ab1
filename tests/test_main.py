"""The main job, small: the real mails, the real command, the figures it promises."""

import json

import numpy as np
import pytest

from jaxsparse.__main__ import auc, hash_words, load_mails, main, split_by_text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::tqdm.TqdmExperimentalWarning")
@pytest.mark.parametrize(
    ("num_rows", "options", "accuracy"),
    [
        (2**14, ["--batch-size", "64", "--epochs", "4"], 0.94),
        (2**16, [], 0.95),
    ],
    ids=["small", "large"],
)
def test_the_command(num_rows, options, accuracy, tmp_path, capsys):
    file = tmp_path / "figures.json"
    main(["--rows", str(num_rows), "--dim", "16", *options, "--json", str(file)])
    figures = json.loads(file.read_text())
    keys = {"test_accuracy", "test_auc", "num_rows", "rows_touched_per_step", "sparse_step_ms", "dense_step_ms"}
    assert keys <= figures.keys()
    assert figures["num_rows"] == num_rows and 1000 < figures["rows_touched_per_step"] < num_rows
    assert figures["test_accuracy"] > accuracy and figures["test_auc"] > 0.98
    shown = capsys.readouterr()
    assert "test AUC" in shown.out and "training" in shown.err


def test_the_data_and_the_split():
    texts, labels = load_mails()
    assert len(texts) == 6046 and labels.sum() == 1896 and len(set(texts)) == 5936
    train, test = split_by_text(texts, 0)
    assert len(train) + len(test) == 6046 and not {texts[i] for i in train} & {texts[i] for i in test}
    assert len({texts[i] for i in test}) == -(-5936 // 5)


def test_hashed_words():
    x = hash_words(["a b a", "", "B a"], 1000)
    assert x.shape == (3, 1000)
    assert x.getnnz(axis=1).tolist() == [4, 0, 3]  # a, b, "a b", "b a"; nothing; b, a, "b a"
    np.testing.assert_allclose(x.sum(1).ravel(), [[1, 0, 1]], rtol=1e-6)
    assert set(x[2].indices) < set(x[0].indices)


def test_auc():
    assert auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])) == 0.75  # scikit-learn's own example
    assert auc(np.array([1.0, 1.0]), np.array([0, 1])) == 0.5
