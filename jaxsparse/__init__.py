"""Sparse inputs, embedding bags and row-sparse training for JAX, Flax and optax.

A training step costs what the rows of its batch cost, not what its tables cost. The sub-packages, top to bottom: `data`
(SciPy matrices and id lists to batches of static shapes), `ops` (pure functions), `trace` (a step as a program, and its
evaluation on some rows), `optim` (any optax optimizer on row-sparse gradients), `parallel` (several devices),
`train` (`js.jit`, and what goes around a step), `export` (a model as NumPy source), `nnx` (the same for modules that
are updated in place), and `command` (`python -m jaxsparse`).
"""

from typing import TYPE_CHECKING

from jaxsparse import memory as memory
from jaxsparse import nn as nn
from jaxsparse import testing as testing
from jaxsparse.data.batch import Batch as Batch
from jaxsparse.data.csr_files import open_csr as open_csr
from jaxsparse.data.csr_files import save_csr as save_csr
from jaxsparse.data.distinct import DistinctIds as DistinctIds
from jaxsparse.data.hashing import cross as cross
from jaxsparse.data.hashing import hash_ids as hash_ids
from jaxsparse.data.pipeline import Batches as Batches
from jaxsparse.data.pipeline import batches as batches
from jaxsparse.data.pipeline import from_scipy as from_scipy
from jaxsparse.data.readers.csv import read_csv as read_csv
from jaxsparse.data.readers.jsonl import read_jsonl as read_jsonl
from jaxsparse.data.readers.lines import Chunk as Chunk
from jaxsparse.data.readers.parquet import read_parquet as read_parquet
from jaxsparse.data.readers.svmlight import read_svmlight as read_svmlight
from jaxsparse.data.readers.text import read_text as read_text
from jaxsparse.data.readers.vw import read_vw as read_vw
from jaxsparse.data.stream import Stream as Stream
from jaxsparse.data.stream import stream as stream
from jaxsparse.export.scoring import export_numpy as export_numpy
from jaxsparse.ops.bcoo import concatenate as concatenate
from jaxsparse.ops.bcoo import dot as dot
from jaxsparse.ops.bcoo import mean as mean
from jaxsparse.ops.bcoo import sum as sum
from jaxsparse.ops.embedding import embedding_bag as embedding_bag
from jaxsparse.ops.embedding import embedding_lookup as embedding_lookup
from jaxsparse.ops.losses import inverse_frequency_weights as inverse_frequency_weights
from jaxsparse.ops.losses import sampled_softmax as sampled_softmax
from jaxsparse.ops.losses import weighted_mean as weighted_mean
from jaxsparse.ops.metrics import Auc as Auc
from jaxsparse.ops.metrics import auc as auc
from jaxsparse.ops.metrics import binary_metrics as binary_metrics
from jaxsparse.ops.multilabel import multilabel_loss as multilabel_loss
from jaxsparse.ops.multilabel import ndcg_at_k as ndcg_at_k
from jaxsparse.ops.multilabel import precision_at_k as precision_at_k
from jaxsparse.ops.multilabel import sampled_multilabel_loss as sampled_multilabel_loss
from jaxsparse.ops.packed import Packed as Packed
from jaxsparse.ops.pursuit import omp as omp
from jaxsparse.ops.row_sparse import RowSparse as RowSparse
from jaxsparse.ops.row_sparse import global_norm as global_norm
from jaxsparse.optim.adagrad import lazy_adagrad as lazy_adagrad
from jaxsparse.optim.adagrad import lazy_ftrl as lazy_ftrl
from jaxsparse.optim.adagrad import lazy_rowwise_adagrad as lazy_rowwise_adagrad
from jaxsparse.optim.averaging import ema_params as ema_params
from jaxsparse.optim.averaging import params_ema as params_ema
from jaxsparse.optim.lazy import lazy as lazy
from jaxsparse.optim.optimizers import lazy_adam as lazy_adam
from jaxsparse.optim.optimizers import lazy_adamw as lazy_adamw
from jaxsparse.optim.optimizers import lazy_rmsprop as lazy_rmsprop
from jaxsparse.optim.optimizers import lazy_sgd as lazy_sgd
from jaxsparse.optim.rounding import stochastic_rounding as stochastic_rounding
from jaxsparse.parallel.collectives import pmean as pmean
from jaxsparse.parallel.collectives import psum as psum
from jaxsparse.parallel.sharding import global_batch as global_batch
from jaxsparse.parallel.sharding import padded_rows as padded_rows
from jaxsparse.parallel.sharding import shard_rows as shard_rows
from jaxsparse.parallel.sharding import spread_ids as spread_ids
from jaxsparse.train.evaluation import evaluate as evaluate
from jaxsparse.train.evaluation import predict as predict
from jaxsparse.train.explain import explain as explain
from jaxsparse.train.grad import grad as grad
from jaxsparse.train.grad import value_and_grad as value_and_grad
from jaxsparse.train.jit import jit as jit
from jaxsparse.train.loops import FitEvent as FitEvent
from jaxsparse.train.loops import fit as fit
from jaxsparse.train.packing import pack as pack
from jaxsparse.train.packing import unpack as unpack
from jaxsparse.train.refresh import flush as flush
from jaxsparse.train.refresh import from_optax_state as from_optax_state
from jaxsparse.train.refresh import refresh as refresh
from jaxsparse.train.refresh import to_optax_state as to_optax_state
from jaxsparse.train.resize import grow as grow
from jaxsparse.train.resize import remap as remap
from jaxsparse.train.resize import shrink as shrink
from jaxsparse.train.rowwise import rowwise as rowwise
from jaxsparse.train.step import make_train_step as make_train_step

__version__ = "0.2.0"

# By what people come for, in the order of the API pages (docs/conf.py), whose titles are the comments.
__all__ = [  # noqa: RUF022
    # A train step
    "jit",
    "rowwise",
    "make_train_step",
    "explain",
    "nnx",
    # Loops and evaluation
    "fit",
    "FitEvent",
    "evaluate",
    "predict",
    # Batches of arrays and streams
    "batches",
    "stream",
    "from_scipy",
    "open_csr",
    "save_csr",
    "Batch",
    "Batches",
    "Stream",
    "DistinctIds",
    # Files and hashing
    "read_csv",
    "read_jsonl",
    "read_parquet",
    "read_svmlight",
    "read_text",
    "read_vw",
    "Chunk",
    "hash_ids",
    "cross",
    # Embeddings and sparse inputs
    "embedding_bag",
    "embedding_lookup",
    "dot",
    "sum",
    "mean",
    "concatenate",
    "nn",
    # Losses and metrics
    "weighted_mean",
    "inverse_frequency_weights",
    "sampled_softmax",
    "multilabel_loss",
    "sampled_multilabel_loss",
    "auc",
    "Auc",
    "binary_metrics",
    "ndcg_at_k",
    "precision_at_k",
    # Sparse codes, and a memory of rare labels
    "omp",
    "memory",
    # Row-sparse gradients
    "value_and_grad",
    "grad",
    "RowSparse",
    "global_norm",
    # Optimizers
    "lazy",
    "lazy_adam",
    "lazy_adamw",
    "lazy_adagrad",
    "lazy_rowwise_adagrad",
    "lazy_ftrl",
    "lazy_rmsprop",
    "lazy_sgd",
    "params_ema",
    "ema_params",
    "stochastic_rounding",
    "testing",
    # Replay of skipped steps, and plain optax
    "flush",
    "refresh",
    "from_optax_state",
    "to_optax_state",
    # Tables that grow
    "grow",
    "remap",
    "shrink",
    # Scoring without JAX
    "export_numpy",
    # Several devices and TPU
    "shard_rows",
    "padded_rows",
    "spread_ids",
    "global_batch",
    "psum",
    "pmean",
    "pack",
    "unpack",
    "Packed",
]

if TYPE_CHECKING:
    from jaxsparse import nnx as nnx
else:

    def __getattr__(name):
        """Imports `nnx` when it is first used, since flax.nnx takes a quarter of a second."""
        if name != "nnx":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        return importlib.import_module("jaxsparse.nnx")

    def __dir__():
        return sorted({*globals(), "nnx"})
