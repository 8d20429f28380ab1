"""Flax linen modules, a few lines each over `embedding` and `ops`. An nnx user calls the functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsparse._names import other_names
from jaxsparse.ops.bcoo import dot
from jaxsparse.ops.embedding import check_mode, embedding_bag


@other_names("nn.EmbeddingBag", {"embedding_dim": "Write features=.", "num_rows": "Write num_embeddings=."})
class EmbeddingBag(nn.Module):
    """A table and `js.embedding_bag` of it: nn.Embed for bags.

    The parameter is "embedding", (num_embeddings, features), as in nn.Embed. Ids, layouts and errors are those of
    `js.embedding_bag`.

    Attributes:
      num_embeddings: rows of the table.
      features: columns of the table.
      combiner: "sum", "mean", "sqrtn" or "max".
      padding_idx: ids equal to it are left out.
      mode: what an id outside the table does to its bag.
      dtype: of the computation and the result; the parameter's by default.
      param_dtype: of the table.
      embedding_init: the table's initializer; normal with variance 1 / features by default, as in nn.Embed.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsparse as js
      >>> bag = js.nn.EmbeddingBag(10, 4, padding_idx=0)
      >>> ids = jnp.array([[3, 1, 0], [0, 0, 0]])
      >>> out = bag.apply(bag.init(jax.random.key(0), ids), ids)
      >>> out.shape, out[1].tolist()
      ((2, 4), [0.0, 0.0, 0.0, 0.0])
    """

    num_embeddings: int
    features: int
    combiner: str = "mean"
    padding_idx: int | None = None
    mode: str = "fill"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    embedding_init: Callable[..., Any] = nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)

    def __post_init__(self) -> None:
        check_mode("nn.EmbeddingBag", self.mode)
        super().__post_init__()

    @nn.compact
    def __call__(self, ids: Any, **layout: Any) -> jax.Array:
        """Bags (B, features) of ids; `layout` is offsets=, segment_ids= and num_bags=, weights= of js.embedding_bag."""
        shape = (self.num_embeddings, self.features)
        table = self.param("embedding", self.embedding_init, shape, self.param_dtype)
        table = table if self.dtype is None else table.astype(self.dtype)
        return embedding_bag(table, ids, combiner=self.combiner, padding_idx=self.padding_idx, mode=self.mode, **layout)


class SparseDense(nn.Module):
    """nn.Dense for sparse inputs: x @ kernel + bias, x being a BCOO or a dense array.

    The kernel's gradient is row-sparse under `js.value_and_grad` when x is a BCOO: its rows are x's columns.

    Attributes:
      features: columns of the result.
      use_bias: whether to add a bias.
      dtype: of the computation and the result; the promotion of input and parameters by default.
      param_dtype: of the parameters.
      kernel_init, bias_init: initializers, those of nn.Dense by default.

    Example:
      >>> import jax, scipy.sparse, jaxsparse as js
      >>> x, layer = js.from_scipy(scipy.sparse.eye_array(3, 5, format="csr")), js.nn.SparseDense(2)
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (3, 2)
    """

    features: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: Any) -> jax.Array:
        """x (n, m) -> (n, features)."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        out = dot(x, kernel if self.dtype is None else kernel.astype(self.dtype))
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
            out = out + jnp.expand_dims(bias, tuple(range(out.ndim - 1)))
        return out if self.dtype is None else out.astype(self.dtype)
