"""js.omp against NumPy's least squares on the chosen atoms, and scikit-learn's values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

import jaxsparse as js

D, ATOMS, B = 12, 30, 7
omp = jax.jit(js.omp, static_argnums=2)


def oracle(dictionary, x, k):
    """In float64, by refitting everything in every round; also how clear the closest choice was."""
    dictionary, code, clear = np.asarray(dictionary, np.float64), np.zeros(dictionary.shape[1]), np.inf
    residual, chosen = np.asarray(x, np.float64), []
    for _ in range(k):
        strength = np.abs(dictionary.T @ residual)
        strength[chosen] = 0
        first, second = np.argsort(-strength)[:2]
        clear = min(clear, (strength[first] - strength[second]) / np.linalg.norm(x))
        chosen.append(first)
        fit = np.linalg.lstsq(dictionary[:, chosen], x, rcond=None)[0]
        residual = x - dictionary[:, chosen] @ fit
    code[chosen] = fit
    return code, clear


def drawn(seed, size=B):
    rng = np.random.default_rng(seed)
    dictionary = rng.normal(size=(D, ATOMS))
    dictionary /= np.linalg.norm(dictionary, axis=0)
    return dictionary.astype(np.float32), rng.normal(size=(size, D)).astype(np.float32)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4]))
def test_against_least_squares(seed, k):
    dictionary, x = drawn(seed)
    for one, got in zip(x, np.asarray(omp(dictionary, x, k)), strict=True):
        want, clear = oracle(dictionary, one, k)
        if clear > 1e-5:  # otherwise two atoms are as good up to rounding
            np.testing.assert_allclose(got, want, atol=1e-5)
        assert np.count_nonzero(got) == k


def test_against_scikit_learn():
    """sklearn.linear_model.orthogonal_mp(dictionary, x.T, n_nonzero_coefs=k).T of scikit-learn 1.9.1."""
    dictionary = np.array([[1, 2, -1, 0, 3, 1], [0, 1, 2, -2, 1, 1], [2, -1, 0, 1, 1, -3], [1, 0, 1, 2, -1, 1]])
    dictionary = (dictionary / np.linalg.norm(dictionary, axis=0)).astype(np.float32)
    x = np.float32([[3, -1, 2, 0.5], [0, 1, -4, 2.5], [1, 1.5, 1, 0.25], [-2, 0.25, 0.5, 3]])  # nowhere a tie
    want = {
        1: [
            [3.0618622, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 4.4744646],
            [0, 0, 0, 0, 1.5155445, 0],
            [0, 0, 0, 0, -2.3815699, 0],
        ],
        2: [
            [3.0618622, 0, -1.8371173, 0, 0, 0],
            [0, 0, 0, 0, -1.5877132, 4.4744646],
            [0, 0, 1.3508215, 0, 1.8339361, 0],
            [2.4932306, 0, 0, 0, -3.5568901, 0],
        ],
        3: [
            [3.0618622, 1.2247449, -1.8371173, 0, 0, 0],
            [1.1022704, 0, 0, 0, -2.1073285, 4.9940798],
            [0.6045215, 0, 1.2797014, 0, 1.5321988, 0],
            [2.2767693, 0, 1.5152292, 0, -3.0977063, 0],
        ],
    }
    for k, codes in want.items():
        np.testing.assert_allclose(omp(dictionary, x, k), codes, atol=1e-5)


def test_batches():
    """Any batch dimensions, none of them, none in them, and those of vmap."""
    dictionary, x = drawn(0)
    want = omp(dictionary, x, 3)

    @jax.jit
    def others(x):
        mapped = jax.vmap(js.omp, (None, 0, None))(dictionary, x, 3)
        return mapped, js.omp(dictionary, x[0], 3), js.omp(dictionary, x[:6].reshape(2, 3, D), 3).reshape(6, ATOMS)

    for got, rows in zip(others(x), (slice(None), 0, slice(6)), strict=True):
        np.testing.assert_allclose(got, want[rows], atol=1e-6)
    assert js.omp(dictionary, x[:0], 3).shape == (0, ATOMS)


@pytest.mark.slow
def test_parts(monkeypatch):
    """Parts of which the last one overlaps the one before."""
    dictionary, x = drawn(0)
    whole = jax.value_and_grad(lambda x: (js.omp(dictionary, x, 3) ** 2).sum())
    want, gradient = whole(x)
    monkeypatch.setattr("jaxsparse.ops.pursuit._CHUNK", 3 * (ATOMS + 7 * D))
    np.testing.assert_allclose(js.omp(dictionary, x, 3), omp(dictionary, x, 3), atol=1e-6)
    got = whole(x)
    np.testing.assert_allclose(got[0], want, rtol=1e-5)
    np.testing.assert_allclose(got[1], gradient, atol=1e-4)


@pytest.mark.cpu("a GPU's sort has a scratch of its own")
def test_memory_does_not_grow_with_the_batch():
    def temporaries(batch):
        dictionary, x = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((64, 256), (batch, 64)))
        return omp.lower(dictionary, x, 4).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(1_000_000) < 1.1 * temporaries(20_000) < 50e6


def test_it_ends_early_where_there_is_nothing_left():
    """A sum of two atoms has a code of two; zero has none; an atom that is there twice is chosen once."""
    dictionary, _ = drawn(1)
    dictionary[:, 1] = dictionary[:, 0]
    x = np.stack([2 * dictionary[:, 3] - dictionary[:, 7], np.zeros(D, np.float32), dictionary[:, 0]])
    codes = np.asarray(omp(dictionary, x, 6))
    want = np.zeros((3, ATOMS))
    want[0, [3, 7]], want[2, 0] = [2, -1], 1
    np.testing.assert_allclose(codes, want, atol=1e-5)
    assert (np.count_nonzero(codes, axis=1) == [2, 0, 1]).all()
    everything = np.asarray(omp(np.eye(3, 4, dtype=np.float32), np.float32([1, 2, 3]), 4))  # k larger than d
    np.testing.assert_allclose(everything, [1, 2, 3, 0], atol=1e-6)


def test_it_goes_on_where_scikit_learn_ends():
    """An atom orthogonal to x, but not to what the first atom put in too much."""
    dictionary = np.float32([[0.8, 0.0, 0.0], [0.6, 1.0, 0.0], [0.0, 0.0, 1.0]])
    codes = np.asarray(omp(dictionary, np.float32([1, 0, 0]), 2))
    np.testing.assert_allclose(codes, [1.25, -0.75, 0], atol=1e-6)  # x exactly; scikit-learn: [0.8, 0, 0]


@pytest.mark.slow
def test_gradients_are_those_of_least_squares_on_the_chosen_atoms():
    dictionary, x = drawn(2, size=1)
    chosen = np.flatnonzero(omp(dictionary, x[0], 3))
    weight = np.random.default_rng(0).normal(size=ATOMS).astype(np.float32)

    def on_chosen(dictionary, x):
        atoms = dictionary[:, chosen]
        return weight[chosen] @ jnp.linalg.solve(atoms.T @ atoms, atoms.T @ x)

    want = jax.grad(on_chosen, (0, 1))(jnp.asarray(dictionary), x[0])
    got = jax.grad(lambda dictionary, x: weight @ omp(dictionary, x, 3), (0, 1))(dictionary, x[0])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    for part in jax.grad(lambda d, x: omp(d, x, 3).sum(), (0, 1))(dictionary, np.zeros(D, np.float32)):
        assert np.isfinite(part).all()


def test_dtypes_and_nan():
    dictionary, x = drawn(3)
    low = omp(dictionary.astype(jnp.bfloat16), x.astype(jnp.bfloat16), 2)
    assert low.dtype == jnp.bfloat16
    wide = omp(*(np.asarray(a.astype(jnp.bfloat16), np.float32) for a in (dictionary, x)), 2)
    np.testing.assert_allclose(np.asarray(low, np.float32), wide, rtol=1e-2)
    bad = x.copy()
    bad[2] = np.nan
    codes = np.asarray(omp(dictionary, bad, 2))
    assert np.isnan(codes[2]).any()
    np.testing.assert_array_equal(np.delete(codes, 2, 0), np.delete(np.asarray(omp(dictionary, x, 2)), 2, 0))


def test_errors():
    dictionary, x = drawn(0)
    with pytest.raises(ValueError, match=r"'x'.*\(\.\.\., 30\).*dictionary\.T"):
        js.omp(dictionary.T, x, 2)
    with pytest.raises(ValueError, match=r"'dictionary'.*\(d, num_atoms\)"):
        js.omp(dictionary[0], x, 2)
    with pytest.raises(TypeError, match=r"'x'.*floating"):
        js.omp(dictionary, x.astype(int), 2)
    with pytest.raises(TypeError, match=r"'x'.*dense"):
        js.omp(dictionary, js.from_scipy(scipy.sparse.csr_matrix(x)), 2)
    for k in (0, ATOMS + 1):
        with pytest.raises(ValueError, match=r"'k'.*1 to 30"):
            js.omp(dictionary, x, k)
    with pytest.raises(TypeError, match=r"'k'.*Python integer"):
        js.omp(dictionary, x, 2.0)
    with pytest.raises(TypeError, match=r"'k'.*static_argnames"):
        jax.jit(js.omp)(dictionary, x, 2)
