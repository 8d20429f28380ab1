"""`python -m jaxsparse train` and `predict` on files of every format, stopped and resumed, and on bad ones."""

import gzip
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import flax.serialization
import jax
import numpy as np
import pytest

from jaxsparse.__main__ import main
from jaxsparse.command.checkpoints import load_checkpoint
from jaxsparse.command.examples import Examples
from jaxsparse.command.files import format_of, inspect_file

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


def vw_of(labels, users, ages):
    rows = zip(labels, users, ages, strict=True)
    return "".join(f"{2 * y - 1} {1 + n % 2} |u u{u} |n age:{a / 30}\n" for n, (y, u, a) in enumerate(rows))


def jsonl_of(labels, users, ages):
    rows = zip(labels.tolist(), users.tolist(), ages.tolist(), strict=True)
    return "".join(json.dumps({"y": y, "user": f"u{u}", "age": a, "t": ["u"] * (u % 3)}) + "\n" for y, u, a in rows)


def text_of(labels, users, ages):
    rows = zip(labels, users, ages, strict=True)
    return "".join(f"{['ham', 'spam'][y]}\tUser u{u} is {a}, user!\n" for y, u, a in rows)


FORMATS = {"a.csv": csv_of, "a.svm": svm_of, "a.vw": vw_of, "a.jsonl": jsonl_of, "a.txt": text_of}


def examples_of(path, held_out=0.1, seed=0, batch_size=8, bad_lines=None):
    settings = {"format": format_of(path), "rows": 64, "zero_based": False}
    settings |= {"seed": seed, "held_out": held_out, "batch_size": batch_size}
    settings |= inspect_file(path, settings["format"], True, None, [], 64)
    examples = Examples(path, settings, bad_lines)
    examples.scan()
    return examples


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
    assert (tmp_path / "model" / "curves.png").exists() == has_plot == ("matplotlib is not installed" not in shown)
    labels, users, ages = table(20)
    (tmp_path / "new.csv").write_text(
        "\n".join(line.split(",", 1)[1] for line in csv_of(labels, users, ages).split("\n")[:-1])
    )
    run("predict model new.csv")
    shown = capsys.readouterr().out
    said = np.array(list(map(float, shown.split())))
    assert ((said > 0.5) == (users % 2 == 0)).all() and said.min() > 0 and said.max() < 1
    run("predict model new.csv --out said")
    assert (tmp_path / "said").read_text() == shown and not (tmp_path / "said.part").exists()


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
    for name in ("one", "two"):
        run(f"predict {name} a.svm --out {name}.txt")
    assert (tmp_path / "one.txt").read_text() == (tmp_path / "two.txt").read_text() and parts_equal("one", "two")
    assert drop(run(f"{whole} --out two --epochs 4 --resume")) == drop(want)  # there is nothing left to train
    before_validation(tmp_path / "two" / "checkpoint.msgpack")
    assert drop(run(f"{whole} --out two --epochs 4 --resume")) == drop(want) and parts_equal("one", "two")


def before_validation(path):
    """Makes a checkpoint what it was when its last epoch was trained, and not yet validated."""
    tree = flax.serialization.msgpack_restore(path.read_bytes())
    rest = json.loads(tree["rest"])
    last, weight = rest["history"].pop(), 1.0
    rest["running"] = {"steps": last["steps"], "total": last["loss"] * weight, "weight": weight, "seconds": 0.0}
    path.write_bytes(flax.serialization.msgpack_serialize(tree | {"rest": json.dumps(rest)}))


def parts_equal(one, two):
    """Whether two checkpoints are the same in every bit but for the seconds."""
    loaded = []
    for folder in (one, two):
        tree = flax.serialization.msgpack_restore(Path(folder, "checkpoint.msgpack").read_bytes())
        rest = json.loads(tree["rest"])
        del rest["running"]["seconds"]
        for entry in rest["history"]:
            del entry["seconds"]
        loaded.append((rest, tree["state"]))
    assert loaded[0][0] == loaded[1][0]
    jax.tree.map(np.testing.assert_array_equal, loaded[0][1], loaded[1][1])
    return True


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_training_that_is_stopped_goes_on_at_the_batch(tmp_path, how):
    """In the middle of an epoch, again and again: kill -9 goes on from what is saved every so often, Ctrl-C from where
    it came. The end is that of a run that was left alone, in every bit."""
    (tmp_path / "a.csv").write_text(csv_of(*table(12_000)))
    options = f"train a.csv --model fm --dim 4 --epochs 3 --buffer 1000 {' '.join(QUICK)}"
    every = "--save-every 1e-9" if how == signal.SIGKILL else ""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

    def start(arguments):
        command = [sys.executable, "-u", "-m", "jaxsparse", *arguments.split()]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)

    def ends(process):
        said = process.communicate(timeout=200)[1]
        assert process.returncode == 0, said

    ends(start(f"{options} --out straight"))
    stops = []
    for _ in range(3):
        resume = "--resume" if (tmp_path / "stopped" / "checkpoint.msgpack").exists() else ""
        process = start(f"{options} --out stopped {every} {resume}")
        wait_for_steps(process, 20)
        process.send_signal(how)
        said = process.communicate(timeout=100)[1]
        assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), said
        tree = flax.serialization.msgpack_restore((tmp_path / "stopped" / "checkpoint.msgpack").read_bytes())
        rest = json.loads(tree["rest"])
        stops.append((len(rest["history"]) + 1, rest["running"]["steps"]))
        assert how == signal.SIGKILL or "goes on from step {1} of epoch {0}.".format(*stops[-1]) in said
    assert stops == sorted(set(stops)) and any(step for _, step in stops), stops
    ends(start(f"{options} --out stopped {every} --resume"))
    assert parts_equal(tmp_path / "straight", tmp_path / "stopped")


def wait_for_steps(process, count):
    """Reads the progress bar until it is there."""
    shown = ""
    while not (steps := re.findall(r"(\d+)step", shown)) or int(steps[-1]) < count:
        character = process.stderr.read(1)
        assert character, shown
        shown += character


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.vw", "a.jsonl", "a.txt.gz"])
def test_other_formats(run, tmp_path, capsys, name):
    content = FORMATS[name.removesuffix(".gz")](*table()).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    extra = "--hashed user" if name == "a.jsonl" else ""
    history = run(f"train {name} --out model --epochs 12 {extra} {' '.join(QUICK)} --rows 1024")
    assert "360 examples to train, 40 held out" in capsys.readouterr().out and history[-1]["held out auc"] > 0.85
    run(f"predict model {name}")
    said = np.array(list(map(float, capsys.readouterr().out.split())))
    assert len(said) == 400 and np.mean((said > 0.5) == table()[0]) > 0.85


# ---- what is read, without a training


@pytest.mark.parametrize("name", FORMATS)
def test_the_held_out_part_and_the_rest_are_the_file(tmp_path, name):
    (tmp_path / name).write_text(FORMATS[name](*table()))
    examples = examples_of(str(tmp_path / name))
    whole = list(examples.chunks())
    parts = [list(examples.part(held_out)) for held_out in (False, True)]
    counts = [sum(len(part[1]) for part in of) for of in parts]
    assert counts == [360, 40] and examples.num_held_out == 40 and examples.settings["binary"]
    first = {seed: examples_of(str(tmp_path / name), seed=seed) for seed in (0, 1)}
    again = [np.concatenate([part[0].toarray() for part in of.part(True)]) for of in first.values()]
    held_out = np.concatenate([part[0].toarray() for part in parts[1]])
    np.testing.assert_array_equal(again[0], held_out)  # in every pass and every process
    assert not np.array_equal(again[1], held_out)
    rows = lambda x, y, *weight: [(*row, label > 0, *w) for row, label, *w in zip(x.toarray().tolist(), y, *weight)]  # noqa: B905, E731
    got = sorted(row for of in parts for part in of for row in rows(*part))
    assert got == sorted(row for x, y, weight in whole for row in rows(x, y, *([] if weight is None else [weight])))
    assert (whole[0][2] is not None) == (name == "a.vw")


def test_a_stream_of_a_file_has_three_shapes_at_most(tmp_path):
    """However long its longest rows are, which come behind the first: more than eight times what was learnt."""
    short, long = "1 1:1 2:1\n", "0 " + " ".join(f"{i}:1" for i in range(1, 900)) + "\n"
    (tmp_path / "a.svm").write_text(short * 3000 + long * 40 + short * 60)
    examples = examples_of(str(tmp_path / "a.svm"), batch_size=8)
    for options in {}, {"shuffle": True, "buffer": 500}:
        stream = examples.stream(lambda: examples.part(False), **options)
        batches = list(stream)
        assert len(stream.rungs) == 3 and sum(stream.rungs) == len(batches)  # and no warning of a fourth
        assert len({(batch.x.nse, batch.distinct.size) for batch in batches}) <= 3
        entries = sum(x.nnz for x, _ in examples.part(False))
        assert sum(int((np.asarray(batch.x.data) != 0).sum()) for batch in batches) == entries


def test_a_file_that_changes_is_found_out(tmp_path):
    (tmp_path / "a.csv").write_text(csv_of(*table()))
    examples = examples_of(str(tmp_path / "a.csv"))
    for other in (399, 401):
        (tmp_path / "a.csv").write_text(csv_of(*table(other)))
        with pytest.raises(OSError, match=r"a\.csv has changed: it had 400 examples"):
            list(examples.part(False))


@pytest.mark.filterwarnings("ignore:js.read_csv")
def test_bad_lines_are_told_once(tmp_path):
    (tmp_path / "a.csv").write_text(csv_of(*table(50)) + "oh\n")
    with pytest.warns(UserWarning, match="1 bad lines"):
        examples = examples_of(str(tmp_path / "a.csv"), bad_lines=str(tmp_path / "bad"))
    before = (tmp_path / "bad").stat().st_mtime_ns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sum(len(y) for _, y in examples.part(False)) == 45
    assert (tmp_path / "bad").stat().st_mtime_ns == before and "line 52" in (tmp_path / "bad").read_text()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for copies in (1, 4):
        (tmp_path / "a.csv").write_text(csv_of(*(np.tile(of, 200 * copies) for of in table())))
        examples = examples_of(str(tmp_path / "a.csv"), batch_size=256)
        stream = examples.stream(lambda of=examples: of.part(False), shuffle=True, buffer=1000)
        tracemalloc.start()
        assert sum(1 for _ in stream) == -(-72_000 * copies // 256)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    order, examples_in_memory = 8 * 240_000, 24 * 240_000  # bytes; the order, of up to 2**20 examples, is kept
    assert peaks[1] - peaks[0] < order + 1e6 < examples_in_memory, peaks


def test_which_format_a_name_says(tmp_path):
    texts = {
        "ham\tsee you": "text",
        "1\t2:3": "svmlight",
        "1 2:3": "svmlight",
        "\n2\tqid:3 1:1": "svmlight",
        "": "svmlight",
    }
    for content, kind in texts.items():
        (tmp_path / "a.txt").write_text(content)
        assert format_of(str(tmp_path / "a.txt")) == kind
    names = {"a.SVM.gz": "svmlight", "a.tsv": "csv", "b.ndjson": "jsonl", "c.vw.gz": "vw", "d.arrow": "parquet"}
    assert {name: format_of(name) for name in names} == names


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
        "one.csv": "y\n1\n",
        "strings.csv": "user,y\n" + "ann,1\n" * 20,
        "bad.vw": "1 |a x\n1 a\n",
        "bad.jsonl": '{"y": 1, "x": 2}\n{"y": 1, "x": 2, "x": 3}\n',
        "no.jsonl": "[1]\n",
        "three.txt": "a\tx\nb\tx\nc\tx\n",
        "bad.txt": "a\tx\nb\tx\nc x\n",
        "numbers.txt": "1\tx y\na\tx\n",
        "half.jsonl": '{"y": 1, "x": 2}\n{"y": 1, "x"\n',
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode())
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(text_of(*table(99)).encode())[:-30])
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(csv_of(*table(99)).encode())[:-30])
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "checkpoint.msgpack").write_bytes(b"no checkpoint")
    (tmp_path / "trained" / "settings.json").write_text(json.dumps({"format": "svmlight", "model": "mlp"}))
    for line, what in {
        "--rows -5": "jaxsparse: argument --rows: it must be an integer above 0 and at most 1,073,741,824, not '-5'",
        "--epochs many": "argument --epochs: it must be an integer above 0, not 'many'",
        "--nothing": "unrecognized arguments",
        "fit a.csv": "'fit' is no command. Commands are train and predict.",
        "train strings.csv --out o": "or give --bad-lines a file for bad lines. Without --label the first",
        "train a.csv": "required: --out",
        "train a.csv --out o --held-out 1": "--held-out: it must be a number above 0 and at most 0.9",
        "train a.csv --out o --model deep": "--model: invalid choice: 'deep'",
        "train gone.csv --out o": "gone.csv does not exist",
        "train . --out o --format csv": ". is not a file",
        "train odd --out o": "which format is it?",
        "train empty.csv --out o": "empty.csv has no rows",
        "train none.svm --out o": "none.svm has no examples",
        "train one.svm --out o": "1 examples, too few",
        "train two.csv --out o": "two columns have one name",
        "train cut.csv.gz --out o": "cut.csv.gz is damaged",
        "train cr.csv --out o": "cr.csv is damaged, or not a CSV file",
        "train bad.svm --out o": "bad.svm, line 2: '2' is not index:value",
        "train line.csv --out o": "line.csv, line 1102: column 'x' is 'a', not a number",
        "train one.csv --out o": "one.csv has no column but 'y', the label",
        "train bad.vw --out o": "bad.vw, line 2: it has no | before the features",
        "train bad.jsonl --out o": "bad.jsonl, line 2: it has the key 'x' twice",
        "train half.jsonl --out o": "half.jsonl, line 2: ",
        "train cut.txt.gz --out o": "cut.txt.gz is damaged, or not a text file",
        "train gone.txt --out o": "gone.txt does not exist",
        "train no.jsonl --out o": "no.jsonl has no JSON objects in its first 1000 lines",
        "train three.txt --out o": "has the labels 'a', 'b', 'c'. Labels must be numbers, or two names",
        "train bad.txt --out o": "bad.txt, line 3: it has no tab between label and text",
        "train numbers.txt --out o": "numbers.txt, line 2: 'a' is not a number",
        "train bad.svm --out o --label y": "--label is for csv and jsonl and parquet, and bad.svm is read as svmlight",
        "train a.csv --out o --zero-based": "--zero-based is for svmlight, and a.csv is read as csv",
        "train a.csv --out o --save-every 0": "--save-every: it must be a number above 0",
        "train a.csv --out o --buffer 0": "--buffer: it must be an integer above 0",
        "train a.csv --out o --label who": "a.csv has no column 'who'. Its columns are 'click', 'user', 'age'",
        "train a.csv --out o --resume": "o has no checkpoint",
        "train a.csv --out trained": "trained has a checkpoint. Go on with --resume",
        "train a.csv --out trained --resume": "the checkpoint in trained has another format, model",
        "train a.csv --out a.csv": "File exists",
        "predict nowhere a.csv": "nowhere has no trained model",
    }.items():
        with pytest.raises(SystemExit) as caught:
            run(line)
        shown = capsys.readouterr()
        assert caught.value.code == 2 and shown.err.count("\n") == 1 and what in shown.err, (line, shown.err)
        assert shown.err.startswith("python -m jaxsparse")


def test_parquet_that_cannot_be_read(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"no table")
    pytest.importorskip("pyarrow")
    said = []
    for module in ("json", "pyarrow"):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setitem(sys.modules, module, None if module == "pyarrow" else json)
            run("train a.parquet --out o")
        said.append(capsys.readouterr().err)
    assert "a.parquet: " in said[0] and "arquet" in said[0] and "pyarrow: pip" not in said[0]
    assert "a.parquet needs pyarrow: pip install 'jaxsparse[arrow]'." in said[1]


def test_examples_without_numbers(tmp_path):
    (tmp_path / "a.csv").write_text("y,user\n1,a\n0,b\n3,a\n")
    ((x, y, _),) = examples_of(str(tmp_path / "a.csv")).chunks()
    assert x.shape == (3, 64) and y.tolist() == [1, 0, 3] and x.toarray().sum(1).tolist() == [1, 1, 1]
    assert (x.toarray()[0] == x.toarray()[2]).all() and (x.toarray()[0] != x.toarray()[1]).any()


@pytest.mark.parametrize("content", [b"no checkpoint", flax.serialization.to_bytes({"state": 1, "rest": "no JSON"})])
def test_a_damaged_checkpoint(tmp_path, content):
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint is damaged: "):
        load_checkpoint(1, tmp_path / "checkpoint")


def test_a_reader_that_goes_away_is_no_error(run, tmp_path, capfd, monkeypatch):
    """`predict ... | head`: what is still to be written goes nowhere, and nothing is said."""

    def broken(options):
        print("written before")
        raise BrokenPipeError

    monkeypatch.setattr("jaxsparse.command.run.predict", broken)
    with open(tmp_path / "pipe", "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as caught:
            run("predict model a.csv")
    assert caught.value.code == 1 and (tmp_path / "pipe").read_text() == "" and capfd.readouterr() == ("", "")
