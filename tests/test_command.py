"""`python -m jaxsparse train` and `predict` on files of every format, stopped and resumed, and on bad ones."""

import gzip
import importlib
import json

import numpy as np
import pytest

from jaxsparse.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore::tqdm.TqdmExperimentalWarning")
QUICK = ["--rows", "64", "--batch-size", "64", "--learning-rate", "0.05"]


def table(n=400):
    """Whether the user's number is even decides the label, but for one in ten; and an age that says nothing."""
    rng = np.random.default_rng(0)
    users, ages = rng.integers(0, 6, n), rng.normal(30, 9, n).round(1)
    return np.where(rng.random(n) < 0.1, rng.random(n) < 0.5, users % 2 == 0).astype(int), users, ages


def csv_of(labels, users, ages):
    return "click,user,age\n" + "".join(f"{y},u{u},{a}\n" for y, u, a in zip(labels, users, ages, strict=True))


def svm_of(labels, users, ages):
    return "".join(f"{2 * y - 1} {u + 1}:1 7:{a / 30}\n" for y, u, a in zip(labels, users, ages, strict=True))


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda text: main(text.split())


@pytest.mark.slow
def test_training_and_predictions(run, tmp_path, capsys):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(csv_of(*table()).encode()))
    history = run(f"train a.csv.gz --out model --model fm --dim 2 --epochs 3 {' '.join(QUICK)}")
    shown = capsys.readouterr().out
    assert "360 examples to train, 40 held out, 65 columns, two classes" in shown and "epoch 3  loss" in shown
    assert history[-1]["held out auc"] > 0.85 and history[-1]["held out accuracy"] > 0.8
    has_plot = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "model" / "curves.png").exists() == has_plot == ("no matplotlib" not in shown)
    labels, users, ages = table(20)
    (tmp_path / "new.csv").write_text(
        "\n".join(line.split(",", 1)[1] for line in csv_of(labels, users, ages).split("\n")[:-1])
    )
    said = run("predict model new.csv")
    assert ((said > 0.5) == (users % 2 == 0)).all() and said.min() > 0 and said.max() < 1
    assert capsys.readouterr().out == "".join(f"{value:.6g}\n" for value in said)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["linear", "fm", "mlp"])
def test_a_resumed_run_is_the_run(run, tmp_path, model):
    (tmp_path / "a.svm").write_text(svm_of(*table()))
    whole = f"train a.svm --model {model} --dim 4 {' '.join(QUICK)}"
    want = run(f"{whole} --out one --epochs 4")
    run(f"{whole} --out two --epochs 1")
    got = run(f"{whole} --out two --epochs 4 --resume")
    drop = lambda history: [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]  # noqa: E731
    assert drop(got) == drop(want) and len(got) == 4
    one, two = (run(f"predict {name} a.svm --out {name}.txt") for name in ("one", "two"))
    np.testing.assert_array_equal(one, two)
    assert (tmp_path / "one.txt").read_text() == "".join(f"{value:.6g}\n" for value in one)


@pytest.mark.slow
def test_numbers_to_predict_and_bad_lines(run, tmp_path, capsys):
    _, users, ages = table()
    lines = [f"{2.5 * u + 1}\tu{u}\t{a}" for u, a in zip(users, ages, strict=True)]
    (tmp_path / "a.tsv").write_text("\n".join([*lines[:300], "oh", *lines[300:]]))
    with pytest.warns(UserWarning, match="1 bad lines"):
        history = run(f"train a.tsv --no-header --out model --epochs 20 --bad-lines bad {' '.join(QUICK)}")
    assert "numbers to predict" in capsys.readouterr().out
    assert history[-1]["held out mse"] < 0.5 * history[0]["held out mse"]
    assert (tmp_path / "bad").read_text() == "a.tsv, line 301: 1 fields, where there are 3 columns\toh\n"


@pytest.mark.slow
def test_parquet(run, tmp_path, capsys):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    labels, users, ages = table()
    columns = {"age": ages, "user": users, "words": [["even"] if u % 2 == 0 else [] for u in users], "y": labels == 1}
    parquet.write_table(pa.table(columns), "a.parquet")
    history = run(f"train a.parquet --label y --hashed user --out model --epochs 3 {' '.join(QUICK)}")
    assert "65 columns, two classes" in capsys.readouterr().out and history[-1]["held out auc"] > 0.85


def test_bad_files_and_options_end_with_a_sentence(run, tmp_path, capsys):
    files = {
        "a.csv": csv_of(*table(9)),
        "bad.svm": "1 1:1\n1 2\n",
        "empty.csv": "",
        "none.svm": "\n",
        "one.svm": "1 1:1\n",
    }
    files |= {
        "two.csv": "a,a\n1,2\n",
        "line.csv": "y,x\n" + "1,2\n" * 1100 + "1,a\n",
        "odd": "1",
        "cr.csv": "y,x\n1,\r2\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode())
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(csv_of(*table(99)).encode())[:-30])
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "checkpoint.msgpack").write_bytes(b"no checkpoint")
    (tmp_path / "trained" / "settings.json").write_text(json.dumps({"format": "svmlight", "model": "mlp"}))
    for line, what in {
        "--rows -5": "jaxsparse: argument --rows: it must be an integer above 0 and at most 1,073,741,824, not '-5'",
        "--epochs many": "argument --epochs: it must be an integer above 0, not 'many'",
        "--nothing": "unrecognized arguments",
        "train a.csv": "required: --out",
        "train a.csv --out o --held-out 1": "--held-out: it must be a number above 0 and at most 0.9",
        "train a.csv --out o --model deep": "--model: invalid choice: 'deep'",
        "train gone.csv --out o": "gone.csv is not there",
        "train . --out o --format csv": ". is no file",
        "train odd --out o": "which format is it?",
        "train empty.csv --out o": "empty.csv has no rows",
        "train none.svm --out o": "none.svm has no examples",
        "train one.svm --out o": "1 examples, too few",
        "train two.csv --out o": "two columns have one name",
        "train cut.csv.gz --out o": "cut.csv.gz is damaged",
        "train cr.csv --out o": "cr.csv is damaged, or no CSV file",
        "train bad.svm --out o": "bad.svm, line 2: '2' is not index:value",
        "train line.csv --out o": "line.csv, line 1102: column 'x' is 'a', no number",
        "train a.csv --out o --label who": "a.csv has no column 'who'. Its columns are 'click', 'user', 'age'",
        "train a.csv --out o --resume": "o has no checkpoint",
        "train a.csv --out trained": "trained has a checkpoint: go on with --resume",
        "train a.csv --out trained --resume": "the checkpoint in trained has another format, model",
        "train a.csv --out a.csv": "File exists",
        "predict nowhere a.csv": "nowhere has no trained model",
    }.items():
        with pytest.raises(SystemExit) as caught:
            run(line)
        shown = capsys.readouterr()
        assert caught.value.code == 2 and shown.err.count("\n") == 1 and what in shown.err, (line, shown.err)
        assert shown.err.startswith("python -m jaxsparse")
