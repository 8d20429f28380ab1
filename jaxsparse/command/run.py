"""The options of train and predict, training with checkpoints, and predictions."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState

from jaxsparse.command import files, models
from jaxsparse.command.checkpoints import Run, load_checkpoint, replaced_file
from jaxsparse.command.examples import Examples
from jaxsparse.ops.losses import weighted_mean
from jaxsparse.ops.metrics import binary_metrics
from jaxsparse.optim.optimizers import lazy_adam
from jaxsparse.train.evaluation import evaluate
from jaxsparse.train.loops import fit
from jaxsparse.train.step import make_train_step

SETTINGS, CHECKPOINT, CURVES = "settings.json", "checkpoint.msgpack", "curves.png"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind: type, low: float, high: float = float("inf")) -> Any:
    """A type for argparse: a number above low and up to high."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low < value <= high:
            what = "an integer" if kind is int else "a number"
            limit = "" if high == float("inf") else f" and at most {high:,}"
            raise argparse.ArgumentTypeError(f"it must be {what} above {low:g}{limit}, not {text!r}")
        return value

    return parse


def parser_of_train() -> Parser:
    parser = Parser(prog="python -m jaxsparse train", description="Trains a model on a file of any size.")
    parser.add_argument("file", help="svmlight, CSV, TSV, Parquet, VW, JSON lines, or label<tab>text; also gzipped")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="a new folder for the model, curves.png and checkpoints"
    )
    parser.add_argument(
        "--model", choices=["linear", "fm", "mlp"], default="linear", help="the model; linear by default"
    )
    parser.add_argument("--format", choices=list(files.FORMATS), help="the format; by default the file's name tells it")
    parser.add_argument("--label", metavar="COLUMN", help="the column to predict; the first one by default")
    parser.add_argument(
        "--hashed", metavar="A,B", default="", help="columns of numbers that are categories, to be hashed like strings"
    )
    parser.add_argument("--no-header", action="store_true", help="CSV without a line of names: columns are c0, c1, ...")
    parser.add_argument("--zero-based", action="store_true", help="svmlight with a first index of 0, not 1")
    parser.add_argument(
        "--rows",
        type=number(int, 0, 2**30),
        default=2**20,
        help="rows of the table that strings are hashed into (2^20)",
    )
    parser.add_argument("--dim", type=number(int, 0), default=16, help="columns of the embeddings of fm and mlp (16)")
    parser.add_argument("--epochs", type=number(int, 0), default=5, help="passes over the file (5)")
    parser.add_argument("--batch-size", type=number(int, 0), default=256, help="examples a step (256)")
    parser.add_argument("--learning-rate", "--lr", type=number(float, 0), default=1e-2, help="of Adam (0.01)")
    parser.add_argument(
        "--held-out", type=number(float, 0, 0.9), default=0.1, help="share of the examples to measure on (0.1)"
    )
    parser.add_argument("--seed", type=number(int, -1), default=0, help="of split, order and initialisation")
    parser.add_argument("--bad-lines", metavar="FILE", help="a file for bad lines; by default they are errors")
    parser.add_argument(
        "--buffer", type=number(int, 0), default=2**16, help="examples that are shuffled together (2^16)"
    )
    parser.add_argument(
        "--save-every",
        type=number(float, 0),
        default=10,
        metavar="MINUTES",
        help="between checkpoints (10); each epoch ends with one",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the --out folder")
    return parser


def parser_of_predict() -> Parser:
    parser = Parser(
        prog="python -m jaxsparse predict",
        description="Prints a prediction a line: a probability for labels of two classes, else a number.",
    )
    parser.add_argument("dir", help="the --out folder of the training")
    parser.add_argument("file", help="examples of the same format and columns; CSV and Parquet need no label")
    parser.add_argument("--out", metavar="FILE", help="a file to write to; by default predictions are printed")
    return parser


def command(argv: list[str]) -> Any:
    """Runs train or predict. An error in a file or an option ends the process with one sentence."""
    parser = parser_of_train() if argv[0] == "train" else parser_of_predict()
    options = parser.parse_args(argv[1:])
    try:
        return train(options) if argv[0] == "train" else predict(options)
    except BrokenPipeError:  # stdout was closed, by head say: drop the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit(1)
    except (UserError, OSError) as error:
        parser.error(str(error))
    except (Interrupted, KeyboardInterrupt) as error:
        parser.exit(130, f"{parser.prog}: {error or 'interrupted.'}\n")


class UserError(Exception):
    """An error in a file or an option."""


class Interrupted(Exception):  # noqa: N818
    """Ctrl-C ended the run; the checkpoint is saved."""


@contextlib.contextmanager
def _file_errors(label: str | None = None) -> Iterator[None]:
    """Errors of readers about a file end the process with one sentence. Other errors keep their traceback.

    Args:
      label: the first column, where it is the label because no --label was given.
    """
    try:
        yield
    except (ValueError, TypeError, OverflowError, ImportError) as error:
        text = str(error).replace("bad_lines=", "--bad-lines")
        if label is not None and f": column {label!r} is " in text:
            text += f" Without --label the first column is the label, here {label!r}."
        raise UserError(text) from error


def train(options: argparse.Namespace) -> list[dict[str, float]]:
    out = Path(options.out)
    kept = ("model", "rows", "dim", "batch_size", "learning_rate", "held_out", "seed", "zero_based", "buffer")
    with _file_errors():
        kind = options.format or files.format_of(options.file)
        given = vars(options)
        files.check_options(options.file, kind, {f"--{name.replace('_', '-')}": given[name] for name in given})
        hashed = [name for name in options.hashed.split(",") if name]
        settings: dict[str, Any] = {"format": kind} | {name: getattr(options, name) for name in kept}
        settings |= files.inspect_file(options.file, kind, not options.no_header, options.label, hashed, options.rows)
    with _file_errors(settings.get("label") if options.label is None else None):
        examples = Examples(options.file, settings, options.bad_lines)
        examples.scan()
    count, num_held_out = settings["num_examples"], examples.num_held_out
    if num_held_out >= count:
        raise UserError(f"{options.file} has {count} examples, too few to hold some of them out.")
    saved = out / SETTINGS
    if options.resume:
        if not saved.exists() or not (out / CHECKPOINT).exists():
            raise UserError(f"--resume: {out} has no checkpoint.")
        differing = {k for k, v in json.loads(saved.read_text()).items() if settings.get(k) != v}
        if differing:
            raise UserError(f"--resume: the checkpoint in {out} has another {', '.join(sorted(differing))}.")
    elif (out / CHECKPOINT).exists():
        raise UserError(f"--out: {out} has a checkpoint. Go on with --resume, or give another folder.")
    out.mkdir(parents=True, exist_ok=True)
    saved.write_text(json.dumps(settings, indent=1))
    print(
        f"{options.file}: {count - num_held_out:,} examples to train, {num_held_out:,} held out, "
        f"{settings['num_columns']:,} columns, {'two classes' if settings['binary'] else 'numbers to predict'}"
    )
    history = _run(examples, out, options)
    for epoch, entry in enumerate(history, 1):
        shown = "  ".join(f"{k} {v:.4f}" for k, v in entry.items() if k not in ("steps", "seconds"))
        print(f"epoch {epoch}  {shown}")
    print(_plot(history, out / CURVES))
    return history


def _run(examples: Examples, out: Path, options: argparse.Namespace) -> list[dict[str, float]]:
    """Trains the remaining epochs with checkpoints, and returns the history."""
    settings = examples.settings
    model, binary = settings["model"], settings["binary"]

    def losses(logits: jax.Array, y: jax.Array) -> jax.Array:
        return jax.nn.softplus(jnp.where(y > 0, -logits, logits)) if binary else (logits - y) ** 2

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return weighted_mean(losses(models.apply(model, params, batch.x), batch.y), batch.weight)

    def metric_fn(params: Any, batch: Any) -> dict[str, Any]:
        outputs = models.apply(model, params, batch.x)
        if not binary:
            return {"held out mse": weighted_mean((outputs - batch.y) ** 2, batch.weight)}
        return {f"held out {k}": v for k, v in binary_metrics(outputs, batch.y, batch.weight).items()}

    row_sparse_step = make_train_step(loss_fn)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        state, metrics = row_sparse_step(state, batch)
        run.add(metrics["loss"], batch.weight)
        return state, metrics

    train_set = examples.stream(lambda: examples.part(False), shuffle=True, buffer=options.buffer, seed=options.seed)
    test_set = examples.stream(lambda: examples.part(True))
    run = Run(new_state(settings), train_set, out / CHECKPOINT, 60 * options.save_every)
    if options.resume:
        with _file_errors():
            run.load()
    if len(run.history) < run.epochs_begun:  # the run stopped between an epoch and its validation
        run.end_epoch(evaluate(metric_fn, run.state, test_set))
        run.save(run.state)
    epochs = options.epochs - len(run.history)
    if epochs > 0:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "js.fit was interrupted")  # Interrupted says so
            run.state, _ = fit(
                step, run.state, train_set, epochs=epochs, validation=test_set, metrics=metric_fn, callback=run.callback
            )
        if len(run.history) < options.epochs:
            run.save(run.state)
            raise Interrupted(f"interrupted; --resume goes on from step {run.steps:,} of epoch {len(run.history) + 1}.")
    return run.history


def new_state(settings: dict[str, Any]) -> TrainState:
    params = models.init(settings["model"], settings["num_columns"], settings["dim"], jax.random.key(settings["seed"]))
    return TrainState.create(apply_fn=None, params=params, tx=lazy_adam(settings["learning_rate"]))


def predict(options: argparse.Namespace) -> None:
    folder = Path(options.dir)
    if not (folder / SETTINGS).exists() or not (folder / CHECKPOINT).exists():
        raise UserError(f"{folder} has no trained model. Give the --out folder of python -m jaxsparse train.")
    with _file_errors():
        settings = json.loads((folder / SETTINGS).read_text())
        examples = Examples(options.file, settings)
        stream = examples.stream(lambda: ((x,) for x, _, _ in examples.chunks(labeled=False)))
        state, _ = load_checkpoint(new_state(settings), folder / CHECKPOINT)
        apply = jax.jit(lambda params, x: models.apply(settings["model"], params, x))
        with replaced_file(Path(options.out)) if options.out else contextlib.nullcontext(sys.stdout) as file:
            for batch, count in stream.counted_epoch():
                outputs = np.asarray(apply(state.params, batch.x))[:count].astype(np.float64)
                outputs = 1 / (1 + np.exp(-outputs)) if settings["binary"] else outputs
                file.writelines(f"{value:.6g}\n" for value in outputs)


def _plot(history: list[dict[str, float]], path: Path) -> str:
    """Draws the curves if matplotlib is installed. Returns a line for the user."""
    if importlib.util.find_spec("matplotlib") is None:
        return f"No {path.name}, because matplotlib is not installed: pip install 'jaxsparse[plot]'"
    figures = importlib.import_module("matplotlib.figure")
    names = [k for k in history[0] if k not in ("steps", "seconds")]
    figure = figures.Figure(figsize=(3.2 * len(names), 2.6), layout="constrained")
    for name, axes in zip(names, np.ravel(figure.subplots(1, len(names))), strict=True):
        axes.plot(range(1, len(history) + 1), [entry.get(name, np.nan) for entry in history], marker="o")
        axes.set(title=name, xlabel="epoch")
    figure.savefig(path)
    return f"curves: {path}"
