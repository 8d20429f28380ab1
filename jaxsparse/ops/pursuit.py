"""Orthogonal matching pursuit: vectors as sums of a few atoms of a dictionary."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.sparse import BCOO

from jaxsparse._checks import check_float, message

_CHUNK = 2**22  # elements of the intermediate arrays of a part, 16 MB in float32


def omp(dictionary: Any, x: Any, k: int) -> jax.Array:
    """Codes of vectors by orthogonal matching pursuit, with at most k atoms each.

    Starts from the residual r = x and repeats k times:

        choose the atom with the largest |<atom, r>|; fit x to all chosen atoms by least squares; r = x - the fit

    Large batches are coded in parts, so that temporary memory does not grow with the batch. Under `jax.vmap` it does:
    num_atoms + (k + 4) d numbers for each vector. Differentiable with respect to both arrays, with the chosen atoms
    held fixed.

    Args:
      dictionary: floating, (d, num_atoms): a column is an atom, as in scikit-learn's `orthogonal_mp`. For a meaningful
        choice the atoms should have one length, usually 1.
      x: floating, (..., d): one vector, or any number of batch dimensions.
      k: how many atoms a code may have, a Python integer from 1 to num_atoms.

    Returns:
      The codes (..., num_atoms), of the wider dtype of the two arrays and computed in float32 or wider: `codes @
      dictionary.T` approximates x. A code has fewer than k atoms if the residual is zero up to rounding before that, or
      if the next atom depends linearly on the chosen ones. (scikit-learn also stops at an atom that is orthogonal to x,
      although such an atom may correct the atoms before it.)

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
    except TypeError:  # JAX's TracerIntegerConversionError as well
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
    """codes_of(x) (B, num_atoms), `size` rows of x at a time. The last part may overlap the one before."""
    if len(x) <= size:
        return codes_of(x)

    def add(codes: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        part = codes_of(jax.lax.dynamic_slice_in_dim(x, start, size))
        return jax.lax.dynamic_update_slice_in_dim(codes, part, start, 0), None

    starts = jnp.minimum(jnp.arange(0, len(x), size), len(x) - size)
    return jax.lax.scan(add, jnp.zeros((len(x), num_atoms), x.dtype), starts)[0]


def _code(atoms: jax.Array, x: jax.Array, *, k: int) -> jax.Array:
    """atoms (num_atoms, d), x (d,) -> (num_atoms,).

    The chosen atoms are factored into an orthonormal basis q (k, d) and an upper triangular r (k, k): chosen atom i is
    r[:, i] @ q. Then x = z @ q + residual, and the coefficients solve r @ coefficients = z. Rows of q without an atom
    are zero, and the columns of r those of the identity.
    """
    num_atoms, eps = len(atoms), jnp.finfo(x.dtype).eps
    dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def norm(v: jax.Array) -> jax.Array:
        square = dot(v, v)
        return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)  # with a gradient at zero

    def choose(i: jax.Array, state: Any) -> Any:
        q, r, z, chosen, residual, goes_on = state
        correlation = jnp.abs(dot(atoms, residual))
        best = jnp.argmax(correlation.at[chosen].set(-1, mode="drop"))
        atom = atoms[best]
        length = norm(atom)
        components = dot(q, atom)
        remainder = atom - dot(components, q)
        correction = dot(q, remainder)  # orthogonalised twice: the first time leaves rounding errors
        components, remainder = components + correction, remainder - dot(correction, q)
        new_length = norm(remainder)
        # Ends at a correlation that is zero up to rounding, and at an atom in the span of the chosen ones.
        noise = 4 * eps * norm(x) * length
        goes_on &= ~((correlation[best] <= noise) | (new_length <= jnp.sqrt(eps) * length))
        unit = jnp.where(goes_on, remainder / jnp.where(new_length > 0, new_length, 1), 0)
        part = dot(unit, residual)
        column = jnp.where(goes_on, components.at[i].set(new_length), jnp.zeros(k, x.dtype).at[i].set(1))
        chosen = chosen.at[i].set(jnp.where(goes_on, best, num_atoms))
        return q.at[i].set(unit), r.at[:, i].set(column), z.at[i].set(part), chosen, residual - part * unit, goes_on

    zeros = functools.partial(jnp.zeros, dtype=x.dtype)
    start = zeros((k, x.size)), jnp.eye(k, dtype=x.dtype), zeros(k), jnp.full(k, num_atoms), x, jnp.array(True)
    _, r, z, chosen, _, _ = jax.lax.fori_loop(0, k, choose, start)
    return zeros(num_atoms).at[chosen].set(jax.scipy.linalg.solve_triangular(r, z), mode="drop")
