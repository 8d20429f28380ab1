"""Sparse inputs, embedding bags and row-sparse training for JAX, Flax and optax.

A training step costs what the rows of its batch cost, not what its tables cost. The data's way through the library, top
to bottom: `pipeline` (SciPy and id lists to static shapes), `ops` and `embedding` (pure functions), `grad` (row-sparse
gradients), `lazy` (any optax optimizer on them), `train` (the step that ties them together), `loops` and
`evaluation` (what goes around it).
"""

from jaxsparse import nn as nn
from jaxsparse import testing as testing
from jaxsparse.adagrad import lazy_adagrad as lazy_adagrad
from jaxsparse.adagrad import lazy_ftrl as lazy_ftrl
from jaxsparse.adagrad import lazy_rowwise_adagrad as lazy_rowwise_adagrad
from jaxsparse.batch import Batch as Batch
from jaxsparse.collectives import pmean as pmean
from jaxsparse.collectives import psum as psum
from jaxsparse.distinct import DistinctIds as DistinctIds
from jaxsparse.embedding import embedding_bag as embedding_bag
from jaxsparse.embedding import embedding_lookup as embedding_lookup
from jaxsparse.evaluation import evaluate as evaluate
from jaxsparse.evaluation import predict as predict
from jaxsparse.explain import explain as explain  # type: ignore[no-redef]
from jaxsparse.grad import grad as grad  # type: ignore[no-redef]
from jaxsparse.grad import value_and_grad as value_and_grad
from jaxsparse.jit import jit as jit  # type: ignore[no-redef]
from jaxsparse.lazy import lazy as lazy  # type: ignore[no-redef]
from jaxsparse.loops import FitEvent as FitEvent
from jaxsparse.loops import fit as fit
from jaxsparse.losses import inverse_frequency_weights as inverse_frequency_weights
from jaxsparse.losses import sampled_softmax as sampled_softmax
from jaxsparse.losses import weighted_mean as weighted_mean
from jaxsparse.ops import concatenate as concatenate
from jaxsparse.ops import dot as dot
from jaxsparse.ops import mean as mean
from jaxsparse.ops import sum as sum
from jaxsparse.optimizers import lazy_adam as lazy_adam
from jaxsparse.optimizers import lazy_adamw as lazy_adamw
from jaxsparse.optimizers import lazy_rmsprop as lazy_rmsprop
from jaxsparse.optimizers import lazy_sgd as lazy_sgd
from jaxsparse.parallel import global_batch as global_batch
from jaxsparse.parallel import padded_rows as padded_rows
from jaxsparse.parallel import shard_rows as shard_rows
from jaxsparse.parallel import spread_ids as spread_ids
from jaxsparse.pipeline import Batches as Batches
from jaxsparse.pipeline import batches as batches
from jaxsparse.pipeline import from_scipy as from_scipy
from jaxsparse.refresh import flush as flush
from jaxsparse.refresh import from_optax_state as from_optax_state
from jaxsparse.refresh import refresh as refresh  # type: ignore[no-redef]
from jaxsparse.refresh import to_optax_state as to_optax_state
from jaxsparse.row_sparse import RowSparse as RowSparse
from jaxsparse.row_sparse import global_norm as global_norm
from jaxsparse.rowwise import rowwise as rowwise  # type: ignore[no-redef]
from jaxsparse.train import make_train_step as make_train_step

__version__ = "0.1.0"
