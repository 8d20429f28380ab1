"""Sparse codes by orthogonal matching pursuit.

A dictionary and vectors go in. The codes that come out approximate each vector by a sum of a few atoms (columns) of the
dictionary.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.sparse import BCOO

from jaxsparse._checks import check_float, message

_CHUNK = 2**22  # numbers that are processed at a time, 16 MB in float32


def omp(dictionary: Any, x: Any, k: int) -> jax.Array:
    """The codes of vectors by orthogonal matching pursuit: at most k atoms each.

    Starting from the residual r = x, k times:

        choose the atom with the largest |<atom, r>|; fit x to all chosen atoms by least squares; r = x - the fit

    A batch is processed in parts, so that memory besides `x`, the codes and the dictionary does not grow with the
    batch. Under `jax.vmap` that memory is num_atoms + (k + 4) d numbers for each vector. The codes are differentiable
    with respect to both arrays, with the chosen atoms held fixed.

    Args:
      dictionary: floating, (d, num_atoms): a column is an atom, as in scikit-learn's `orthogonal_mp`. All atoms should
        have the same length, usually 1.
      x: floating, (..., d): one vector, or any number of batch dimensions.
      k: the largest number of atoms of a code, a Python integer from 1 to num_atoms.

    Returns:
      The codes (..., num_atoms), of the wider dtype of the two arrays, computed in float32 or wider: `codes @
      dictionary.T` approximates x. A code has fewer than k atoms if the residual becomes zero up to rounding, or if the
      next atom is linearly dependent on the chosen ones. (scikit-learn also stops at an atom that is orthogonal to x
      itself, even if it would reduce the residual.)

    Raises:
      TypeError: if an array is not floating, or k is no Python integer.
      ValueError: for shapes that do not fit, or a k out of range.

    Example:
      >>> import jax.numpy as jnp, jaxsparse as js
      >>> dictionary = jnp.array([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]])  # three atoms of length 1
      >>> js.omp(dictionary, jnp.array([[3.0, 4.0], [0.0, 2.0]]), k=1).round(4).tolist()
      [[0.0, 0.0, 5.0], [0.0, 2.0, 0.0]]

    References:
      Pati, Rezaiifar and Krishnaprasad, "Orthogonal matching pursuit"; sklearn.linear_model.orthogonal_mp
    """
    f = "omp"
    if isinstance(x, BCOO) or isinstance(dictionary, BCOO):
        name = "x" if isinstance(x, BCOO) else "dictionary"
        raise TypeError(message(f, name, "a dense array", "a BCOO", "A residual is dense: x.todense(), in batches."))
    dictionary, x = jnp.asarray(dictionary), jnp.asarray(x)
    check_float(f, "dictionary", dictionary)
    check_float(f, "x", x)
    if dictionary.ndim != 2:
        raise ValueError(message(f, "dictionary", "of shape (d, num_atoms)", f"{dictionary.shape=}"))
    if x.ndim < 1 or x.shape[-1] != dictionary.shape[0]:
        do = "The atoms are the columns: pass dictionary.T." if x.ndim and x.shape[-1] == dictionary.shape[1] else ""
        must = f"of shape (..., {dictionary.shape[0]}), for dictionary {dictionary.shape}"
        raise ValueError(message(f, "x", must, f"{x.shape=}", do))
    d, num_atoms = dictionary.shape
    try:
        k = operator.index(k)
    except TypeError:  # JAX's own, too, for an argument that is traced
        raise TypeError(message(f, "k", "a Python integer", k, "Under jax.jit: static_argnames='k'.")) from None
    if not 1 <= k <= num_atoms:
        raise ValueError(message(f, "k", f"from 1 to {num_atoms}, the number of atoms", k))

    dtype = jnp.result_type(dictionary, x)
    wide = jnp.promote_types(dtype, jnp.float32)
    atoms, vectors = dictionary.T.astype(wide), x.reshape(-1, d).astype(wide)
    code = functools.partial(_code, atoms, k=min(k, d))
    codes = _in_parts(jax.vmap(code), vectors, num_atoms, max(1, _CHUNK // (num_atoms + (k + 4) * d)))
    return codes.reshape(*x.shape[:-1], num_atoms).astype(dtype)


def _in_parts(codes_of: Callable[[jax.Array], jax.Array], x: jax.Array, num_atoms: int, size: int) -> jax.Array:
    """codes_of(x) (B, num_atoms), for `size` rows of x at a time. The last part overlaps the one before."""
    if len(x) <= size:
        return codes_of(x)

    def add(codes: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        part = codes_of(jax.lax.dynamic_slice_in_dim(x, start, size))
        return jax.lax.dynamic_update_slice_in_dim(codes, part, start, 0), None

    starts = jnp.minimum(jnp.arange(0, len(x), size), len(x) - size)
    return jax.lax.scan(add, jnp.zeros((len(x), num_atoms), x.dtype), starts)[0]


def _code(atoms: jax.Array, x: jax.Array, *, k: int) -> jax.Array:
    """atoms (num_atoms, d), x (d,) -> (num_atoms,).

    The chosen atoms are kept as an orthonormal basis q (k, d) and an upper triangular r (k, k): chosen atom i is
    r[:, i] @ q. So x = z @ q + residual, and the coefficients solve r @ coefficients = z. Where no atom was chosen, q
    is zero and r the identity.
    """
    num_atoms, eps = len(atoms), jnp.finfo(x.dtype).eps
    dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def norm(v: jax.Array) -> jax.Array:
        square = dot(v, v)
        return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)  # with a gradient at zero

    def choose(i: jax.Array, state: Any) -> Any:
        q, r, z, chosen, residual, more = state
        correlation = jnp.abs(dot(atoms, residual))
        best = jnp.argmax(correlation.at[chosen].set(-1, mode="drop"))
        atom = atoms[best]
        length = norm(atom)
        along = dot(q, atom)
        across = atom - dot(along, q)
        correction = dot(q, across)  # a second time, for what rounding left of the first
        along, across = along + correction, across - dot(correction, q)
        height = norm(across)
        # Stops if the correlation is zero up to rounding, or if the atom is in the span of the chosen ones.
        noise = 4 * eps * norm(x) * length
        more &= ~((correlation[best] <= noise) | (height <= jnp.sqrt(eps) * length))
        unit = jnp.where(more, across / jnp.where(height > 0, height, 1), 0)
        part = dot(unit, residual)
        column = jnp.where(more, along.at[i].set(height), jnp.zeros(k, x.dtype).at[i].set(1))
        chosen = chosen.at[i].set(jnp.where(more, best, num_atoms))
        return q.at[i].set(unit), r.at[:, i].set(column), z.at[i].set(part), chosen, residual - part * unit, more

    zeros = functools.partial(jnp.zeros, dtype=x.dtype)
    nothing = zeros((k, x.size)), jnp.eye(k, dtype=x.dtype), zeros(k), jnp.full(k, num_atoms), x, jnp.array(True)
    _, r, z, chosen, _, _ = jax.lax.fori_loop(0, k, choose, nothing)
    return zeros(num_atoms).at[chosen].set(jax.scipy.linalg.solve_triangular(r, z), mode="drop")
