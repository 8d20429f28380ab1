"""embedding_lookup and embedding_bag against NumPy, dense gradients and the values of torch and TensorFlow."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import jaxsparse as js
from tests import oracles

COMBINERS = ("sum", "mean", "sqrtn", "max")
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}

# ---------------------------------------------------------------------------------------------------------------------
# torch and TensorFlow

W = np.arange(1.0, 11.0, dtype=np.float32).reshape(5, 2)
IDS, OFFSETS = np.array([3, 1, 1, 1, 4, 0]), np.array([0, 0, 3, 3, 6])
WEIGHTS = np.array([0.5, -1.0, 2.0, 0.0, 1.0, 3.0], np.float32)
COTANGENT = np.array([[99.0, 99.0], [1.0, 2.0], [99.0, 99.0], [3.0, 4.0], [99.0, 99.0]], np.float32)


def layouts(padding_idx):
    """IDS and WEIGHTS in every layout; what a short bag is filled up with is padding_idx and a weight of 77."""
    pad = -1 if padding_idx is None else padding_idx
    filled = np.zeros((5, 3), bool)
    filled[[1, 3]] = True
    padded, weights = np.full((5, 3), pad), np.full((5, 3), 77.0, np.float32)
    padded[filled], weights[filled] = IDS, WEIGHTS
    shuffle = np.array([5, 2, 0, 4, 1, 3])  # segments need no order; the shuffle keeps none
    shuffled = {"ids": IDS[shuffle], "segment_ids": np.repeat([1, 3], 3)[shuffle], "num_bags": 5}
    given_pad = {} if padding_idx is None else {"padding_idx": padding_idx}
    return {
        "padded": ({"ids": padded, "padding_idx": pad}, weights),
        "offsets": ({"ids": IDS, "offsets": OFFSETS, **given_pad}, WEIGHTS),
        "last offset": ({"ids": IDS, "offsets": [*OFFSETS, 6], "include_last_offset": True, **given_pad}, WEIGHTS),
        "segments": ({"ids": IDS, "segment_ids": np.repeat([1, 3], 3), "num_bags": 5, **given_pad}, WEIGHTS),
        "shuffled segments": ({**shuffled, **given_pad}, WEIGHTS[shuffle]),
    }


LAYOUTS = list(layouts(None))

# (combiner, padding_idx): the filled bags 1 and 3, and the table's gradient, by torch 2.13's EmbeddingBag.
TORCH = {
    ("sum", None): ([[13, 16], [13, 16]], [[3, 4], [5, 8], [0, 0], [1, 2], [3, 4]]),
    ("sum", 1): ([[7, 8], [10, 12]], [[3, 4], [0, 0], [0, 0], [1, 2], [3, 4]]),
    ("mean", None): (
        [[4.333333492279053, 5.333333492279053]] * 2,
        [
            [1, 1.3333333730697632],
            [1.6666667461395264, 2.6666667461395264],
            [0, 0],
            [0.3333333432674408, 0.6666666865348816],
            [1, 1.3333333730697632],
        ],
    ),
    ("mean", 1): ([[7, 8], [5, 6]], [[1.5, 2], [0, 0], [0, 0], [1, 2], [1.5, 2]]),
    ("max", None): ([[7, 8], [9, 10]], [[0, 0], [0, 0], [0, 0], [1, 2], [3, 4]]),
    ("max", 1): ([[7, 8], [9, 10]], [[0, 0], [0, 0], [0, 0], [1, 2], [3, 4]]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("combiner", "padding_idx"), TORCH)
def test_torch_embedding_bag(combiner, padding_idx, layout):
    kwargs, _ = layouts(padding_idx)[layout]
    out, vjp = jax.vjp(lambda w: js.embedding_bag(w, combiner=combiner, **kwargs), W)
    filled, gradient = TORCH[combiner, padding_idx]
    np.testing.assert_allclose(out, [[0, 0], filled[0], [0, 0], filled[1], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(vjp(COTANGENT)[0], gradient, rtol=1e-6)


@pytest.mark.parametrize("combiner", COMBINERS)
def test_torch_only_empty_bags(combiner):
    out, vjp = jax.vjp(lambda w: js.embedding_bag(w, [], offsets=[0, 0, 0], combiner=combiner), W)
    np.testing.assert_array_equal(out, np.zeros((3, 2)))
    np.testing.assert_array_equal(vjp(np.full((3, 2), 99.0, np.float32))[0], np.zeros((5, 2)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_per_sample_weights(layout):
    kwargs, weights = layouts(None)[layout]
    out, vjp = jax.vjp(lambda w, s: js.embedding_bag(w, weights=s, combiner="sum", **kwargs), W, weights)
    np.testing.assert_allclose(out, [[0, 0], [6.5, 8], [0, 0], [12, 16], [0, 0]])
    table_gradient, weight_gradient = vjp(COTANGENT)
    np.testing.assert_allclose(table_gradient, [[9, 12], [1, 2], [0, 0], [0.5, 1], [3, 4]])
    by_weight = dict(zip([0.5, -1.0, 2.0, 0.0, 1.0, 3.0], [23, 11, 11, 25, 67, 11], strict=True)) | {77.0: 0}
    np.testing.assert_allclose(weight_gradient, np.vectorize(by_weight.get)(weights))


@pytest.mark.parametrize("table", [[1, 1, 1], [2, 2, 1]])
@pytest.mark.parametrize(("ids", "gradient"), [([0, 1, 2], [1, 0, 0]), ([1, 0, 2], [0, 1, 0])])
@pytest.mark.parametrize("layout", [{"offsets": [0]}, {"segment_ids": [0, 0, 0], "num_bags": 1}, {}])
def test_torch_max_gives_its_gradient_to_the_first_of_equals(table, ids, gradient, layout):
    ids = ids if layout else [ids]
    bag = jax.grad(lambda t: js.embedding_bag(t, ids, combiner="max", **layout).sum())
    np.testing.assert_array_equal(bag(jnp.asarray(table, jnp.float32)[:, None])[:, 0], gradient)


# TensorFlow 2.15, safe_embedding_lookup_sparse of SafeEmbeddingLookupSparseTest._ids_and_weights_2d: id -1 is pruned.
TF_TABLE = np.arange(1.0, 17.0, dtype=np.float32).reshape(4, 4)
TF_IDS, TF_BAGS = np.array([0, 1, -1, -1, 2, 0, 1]), np.array([0, 0, 0, 1, 3, 4, 4])
TF_WEIGHTS = np.array([1.0, 2.0, 1.0, 1.0, 3.0, 0.0, -0.5], np.float32)
TF = {  # first columns of bags 0, 3, 4; the others are empty
    ("sum", True): (11.0, 27.0, -2.5),
    ("sum", False): (6.0, 9.0, 6.0),
    ("mean", True): (3.6666667461395264, 9.0, 0.0),
    ("mean", False): (3.0, 9.0, 3.0),
    ("sqrtn", True): (4.919349670410156, 9.0, 0.0),
    ("sqrtn", False): (4.242640495300293, 9.0, 4.242640495300293),
}


@pytest.mark.parametrize(("combiner", "weighted"), TF)
def test_tensorflow_safe_embedding_lookup_sparse(combiner, weighted):
    ids = TF_IDS
    if weighted and combiner != "sum":  # the "safe" of TensorFlow also prunes weights <= 0 here; js leaves them alone
        ids = np.where(TF_WEIGHTS > 0, TF_IDS, -1)
    weights = TF_WEIGHTS if weighted else None
    out = js.embedding_bag(
        TF_TABLE, ids, segment_ids=TF_BAGS, num_bags=5, weights=weights, combiner=combiner, padding_idx=-1
    )
    first = TF[combiner, weighted]
    np.testing.assert_allclose(out[:, 0], [first[0], 0, 0, first[1], first[2]], rtol=1e-6)
    step = (out[:, 1:] - out[:, :-1]).T  # all columns of TF_TABLE are one apart
    np.testing.assert_allclose(step, np.broadcast_to(step[0], step.shape), rtol=1e-5)


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_tensorflow_missing_bags(combiner):
    """EmbeddingLookupSparseTest.testMissingInSparseIds: bags 1 and 3 hold an id of a table of ones, 0 and 2 none."""
    out = js.embedding_bag(
        np.ones((4, 5), np.float32), [0, 2], segment_ids=[1, 3], num_bags=4, weights=np.ones(2), combiner=combiner
    )
    np.testing.assert_array_equal(out, np.broadcast_to([[0.0], [1.0], [0.0], [1.0]], (4, 5)))


# ---------------------------------------------------------------------------------------------------------------------
# any shape, against the oracle and against a dense program


def value_and_ones_gradient(f, *args):
    """f(*args), and the gradient of its sum."""
    out, vjp = jax.vjp(f, *args)
    return out, *vjp(jnp.ones_like(out))


def dense_bag(table, weights, ids, bags, combiner, padding_idx):
    """The bag as anyone would write it without us: a dense S, and S @ table."""
    ids = np.asarray(ids).reshape(-1)
    member = np.array([[i in bag and ids[i] != padding_idx for i in range(ids.size)] for bag in bags], bool)
    member = member.reshape(len(bags), ids.size)
    rows = jnp.asarray(ids[:, None] == np.arange(len(table)), table.dtype) @ table.reshape(len(table), -1)
    if combiner == "max":
        best = jnp.max(jnp.where(member[:, :, None], rows[None], -jnp.inf), axis=1, initial=-jnp.inf)
        out = jnp.where(member.any(1)[:, None], best, 0)
    else:
        s = member * (jnp.ones(ids.size) if weights is None else weights.reshape(-1))[None]
        norm = {"sum": jnp.ones(len(bags)), "mean": s.sum(1), "sqrtn": jnp.sqrt(jnp.where(s.any(1), (s**2).sum(1), 1))}
        norm = jnp.where(s.any(1) | (combiner == "sum"), norm[combiner], jnp.inf)
        out = s @ rows / norm[:, None]
    return out.reshape(len(bags), *table.shape[1:])


@st.composite
def bag_cases(draw, outside_ids=()):
    """A table, ids and embedding_bag's keywords in any layout: empty bags, no bags, repeats, padding of any kind."""
    num_rows, tail = draw(st.sampled_from([1, 2, 7])), draw(st.sampled_from([(), (3,), (2, 2)]))
    layout = draw(st.sampled_from(["padded", "offsets", "last", "segments"]))
    combiner = draw(st.sampled_from(COMBINERS))
    padding_idx = draw(st.sampled_from([None, 0, num_rows - 1, num_rows, -1, 2**40]))
    choices = st.integers(0, num_rows - 1)
    if padding_idx is not None and padding_idx < 2**31:
        choices |= st.just(padding_idx)
    for i in outside_ids:
        choices |= st.just(i)
    num_bags = draw(st.integers(0, 3))
    if layout == "padded":
        shape = (num_bags, draw(st.integers(0, 4)))
        kwargs = {}
    else:
        lengths = draw(st.lists(st.sampled_from([0, 0, 1, 3]), min_size=num_bags, max_size=num_bags))
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=int)])
        outside = draw(st.integers(0, 2))  # ids that are in no bag, where the layout can say so
        shape = (int(starts[-1]) + (outside if layout != "offsets" or not num_bags else 0),)
        if layout == "segments":
            inside = st.lists(st.integers(-1, num_bags), min_size=shape[0], max_size=shape[0])
            kwargs = {"segment_ids": np.array(draw(inside), np.int32), "num_bags": num_bags}
        elif layout == "last":
            kwargs = {"offsets": starts, "include_last_offset": True}
        else:
            kwargs = {"offsets": starts[:-1]}
    size = int(np.prod(shape))
    ids = np.array(draw(st.lists(choices, min_size=size, max_size=size)), np.int32).reshape(shape)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    table = rng.normal(size=(num_rows, *tail)) + 0.1
    if combiner != "max" and draw(st.booleans()):
        kwargs["weights"] = draw(st.sampled_from([1.0, 0.0])) * rng.uniform(0.5, 1.5, shape)  # or a sum of zero
    return table, ids, {"combiner": combiner, "padding_idx": padding_idx, **kwargs}


@settings(max_examples=30)
@given(
    bag_cases() | bag_cases(outside_ids=(-3, 7)),
    st.sampled_from(["fill", "clip"]),
    st.sampled_from(["float32", "float32", "bfloat16", "float16"]),
)
def test_bag_equals_the_oracle(case, mode, dtype):
    table, ids, kwargs = case
    kwargs["mode"] = mode
    table = jnp.asarray(table, dtype)
    if "weights" in kwargs:
        kwargs["weights"] = np.asarray(jnp.asarray(kwargs["weights"], dtype))
    out = jax.jit(lambda t: js.embedding_bag(t, ids, **kwargs))(table)
    want = oracles.bag(table, ids, **kwargs)
    assert out.dtype == table.dtype and out.shape == want.shape
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@settings(max_examples=20)
@given(bag_cases())
def test_bag_gradients_equal_those_of_a_dense_program(case):
    with jax.enable_x64(True):
        table, ids, kwargs = case
        weights, combiner, padding_idx = kwargs.pop("weights", None), kwargs["combiner"], kwargs["padding_idx"]
        where = {k: kwargs[k] for k in ("offsets", "segment_ids", "num_bags", "include_last_offset") if k in kwargs}
        bags = oracles.positions(ids, **where)
        cotangent = np.random.default_rng(1).normal(size=(len(bags), *table.shape[1:]))

        def ours(args):
            return jnp.vdot(cotangent, js.embedding_bag(args[0], ids, weights=args[1], **kwargs))

        def plain(args):
            return jnp.vdot(cotangent, dense_bag(*args, ids, bags, combiner, padding_idx))

        got, want = jax.jit(lambda args: (jax.grad(ours)(args), jax.grad(plain)(args)))((table, weights))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), got, want)


@pytest.mark.parametrize(
    ("combiner", "layout"),
    [("sum", "padded"), ("mean", "offsets"), ("sqrtn", "padded"), ("max", "padded"), ("max", "shuffled segments")],
)
def test_bag_derivatives_equal_finite_differences(combiner, layout):
    """In float64, forward and reverse, with respect to table and weights."""
    with jax.enable_x64(True):
        kwargs, weights = layouts(None)[layout]
        table = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
        weights = jnp.asarray(weights, jnp.float64) + 0.25  # off zero, where sqrtn has a corner
        if combiner == "max":
            weights = None
        bag = jax.jit(lambda t, w: js.embedding_bag(t, weights=w, combiner=combiner, **kwargs))
        check_grads(bag, (table, weights), 1, eps=1e-5, rtol=1e-7, atol=1e-7)


@settings(max_examples=25)
@given(
    st.sampled_from([(), (0,), (4,), (2, 0), (2, 3), (1, 2, 2)]), st.sampled_from([(1,), (6,), (6, 2), (6, 2, 3)]),
    st.sampled_from([None, 0, 5, 6, -1, 10**12]), st.sampled_from(["float32", "bfloat16", "float16"]), st.data(),
)  # fmt: skip
def test_lookup_equals_the_oracle(shape, table_shape, padding_idx, dtype, data):
    table = jnp.asarray(np.random.default_rng(0).normal(size=table_shape), dtype)
    choices = st.integers(-2, table_shape[0] + 1)
    ids = np.array([data.draw(choices) for _ in range(int(np.prod(shape)))], np.int32).reshape(shape)
    for mode in ("fill", "clip"):
        lookup = functools.partial(js.embedding_lookup, ids=ids, padding_idx=padding_idx, mode=mode)
        out, got = jax.jit(value_and_ones_gradient, static_argnums=0)(lookup, table)
        assert out.dtype == table.dtype
        want = oracles.lookup(table, ids, padding_idx, mode)
        np.testing.assert_array_equal(np.asarray(out, np.float64), want)
        gradient = np.zeros(table_shape)
        for i in ids.reshape(-1):
            row = min(max(int(i), 0), table_shape[0] - 1) if mode == "clip" else int(i)
            if i != padding_idx and 0 <= row < table_shape[0]:
                gradient[row] += 1
        np.testing.assert_array_equal(np.asarray(got, np.float64), gradient)


# ---------------------------------------------------------------------------------------------------------------------
# jit, vmap, dtypes


@pytest.mark.parametrize(
    ("combiner", "layout"),
    [*((c, "padded") for c in COMBINERS), ("sqrtn", "offsets"), ("max", "last offset"), ("mean", "shuffled segments")],
)
def test_bag_under_jit_and_vmap(combiner, layout):
    """A batch of tables, ids and weights, jitted: each as when called alone, value and gradient."""
    (kwargs, weights), rng = layouts(None)[layout], np.random.default_rng(0)
    ids, padding_idx = np.asarray(kwargs.pop("ids")), kwargs.pop("padding_idx", None)
    tables = rng.normal(size=(3, 5, 2)).astype(np.float32)
    many_ids = np.stack([ids, np.where(ids == 1, 2, ids), np.where(ids == 4, 9, ids)])  # the last: outside the table
    bounds = {k: np.stack([kwargs.pop(k)] * 3) for k in ("offsets", "segment_ids") if k in kwargs}
    many_weights = np.stack([weights, 2 * weights + 1, weights - 3])

    def bag(table, ids, weights, bounds):
        weights = None if combiner == "max" else weights
        return js.embedding_bag(
            table, ids, weights=weights, combiner=combiner, padding_idx=padding_idx, **bounds, **kwargs
        )

    def both(*args):
        out, vjp = jax.vjp(bag, *args)
        return out, vjp(COTANGENT)[0]

    batch = (tables, many_ids, many_weights, bounds)
    got = jax.jit(jax.vmap(both))(*batch)
    one = jax.jit(both)
    alone = [one(*jax.tree.map(lambda x, i=i: x[i], batch)) for i in range(3)]
    for a, b in zip(got, zip(*alone, strict=True), strict=True):
        np.testing.assert_allclose(a, np.stack(b), rtol=1e-5, atol=1e-6)
    assert np.isnan(got[0][2, 3]).all() and np.isfinite(got[0][2, :3]).all() and np.isfinite(got[1]).all()


def test_lookup_under_jit_and_vmap():
    ids = np.array([[0, 9], [4, -1]])
    lookup = jax.jit(jax.vmap(lambda i: js.embedding_lookup(W, i, padding_idx=-1)))
    np.testing.assert_array_equal(lookup(ids), [[W[0], [np.nan] * 2], [W[4], [0, 0]]])


@pytest.mark.parametrize("combiner", COMBINERS)
@pytest.mark.parametrize("layout", ["padded", "offsets"])
def test_float64_stays_float64(combiner, layout):
    with jax.enable_x64(True):
        kwargs, weights = layouts(None)[layout]
        kwargs["weights"] = None if combiner == "max" else weights.astype(np.float64) + 0.1
        table = np.random.default_rng(0).normal(size=(5, 2))
        out = jax.jit(lambda: js.embedding_bag(table, combiner=combiner, **kwargs))()
        assert out.dtype == np.float64
        np.testing.assert_allclose(out, oracles.bag(table, combiner=combiner, **kwargs), rtol=1e-13)


@pytest.mark.parametrize("length", [61, 81])  # unrolled, and one gather
@pytest.mark.parametrize("layout", ["padded", "offsets"])
def test_16_bit_tables_are_summed_in_float32(layout, length):
    """256 + 1 is 256 in bfloat16, so a running sum would stay there."""
    ids = np.minimum(np.arange(length), 1)
    where = {"ids": ids[None]} if layout == "padded" else {"ids": ids, "offsets": [0]}
    out = js.embedding_bag(jnp.array([[256.0], [1.0]], jnp.bfloat16), combiner="sum", **where)
    assert out.dtype == jnp.bfloat16 and out.item() == 256 + length - 1


@pytest.mark.parametrize("combiner", ["mean", "sqrtn"])
def test_the_mean_of_equal_rows_is_that_row(combiner):
    out = js.embedding_bag(jnp.ones((1, 1)), np.zeros((1, 41), int), combiner=combiner)  # 41 * (1 / 41) is not 1
    assert out.item() == (1 if combiner == "mean" else np.float32(41) / np.sqrt(np.float32(41)))


def count(jaxpr, name):
    """How often a primitive occurs in a program, nested programs included."""
    total = 0
    for eqn in jaxpr.eqns:
        total += eqn.primitive.name == name
        inner = (getattr(p, "jaxpr", None) for p in eqn.params.values())
        total += sum(count(p, name) for p in inner if p is not None)
    return total


@pytest.mark.parametrize(("combiner", "most"), [("sum", 1), ("mean", 1), ("max", 2)])
def test_long_bags_are_not_unrolled(combiner, most):
    ids = np.zeros((2, 500), np.int32)
    program = jax.make_jaxpr(lambda t: js.embedding_bag(t, ids, combiner=combiner))(W)
    assert 1 <= count(program.jaxpr, "gather") <= most


@pytest.mark.parametrize("length", [64, 65])
def test_unrolled_and_not_unrolled_agree_with_the_oracle(length):
    rng = np.random.default_rng(length)
    ids, weights = rng.integers(-1, 5, (2, length)), rng.normal(size=(2, length)).astype(np.float32)
    kwargs = {"weights": weights, "combiner": "sum", "padding_idx": -1}
    bag = functools.partial(js.embedding_bag, ids=ids, **kwargs)
    out, gradient = jax.jit(value_and_ones_gradient, static_argnums=0)(bag, W)
    np.testing.assert_allclose(out, oracles.bag(W, ids, **kwargs), rtol=1e-4, atol=1e-3)
    hits = [weights[ids == i].sum(dtype=np.float64) for i in range(5)]
    np.testing.assert_allclose(gradient, np.stack([hits, hits], 1), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# ids: outside the table, padding, and of any integer type


@pytest.mark.parametrize(("bad", "nearest"), [(-1, 0), (5, 4)])
@pytest.mark.parametrize("combiner", COMBINERS)
@pytest.mark.parametrize("layout", ["padded", "offsets", "shuffled segments"])
def test_an_id_outside_the_table(layout, combiner, bad, nearest):
    """Bag 3 holds it. fill and drop: NaN there and no gradient from there; clip: the nearest row, gradient and all."""
    kwargs, weights = layouts(-7)[layout]
    weights = None if combiner == "max" else weights + 0.5
    good_ids = kwargs.pop("ids")
    ids = np.where(good_ids == 4, bad, good_ids)

    def all_of(ids, mode, cotangent):
        bag = functools.partial(js.embedding_bag, combiner=combiner, mode=mode, **kwargs)
        out, vjp = jax.vjp(lambda t, w: bag(t, ids, weights=w), W, weights)
        return out, *vjp(cotangent)

    same = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    expected = all_of(good_ids, "fill", np.where(np.arange(5)[:, None] == 3, 0, COTANGENT))
    for mode in ("fill", "drop"):
        out, *gradients = all_of(ids, mode, COTANGENT)
        same(out, np.where(np.arange(5)[:, None] == 3, np.nan, expected[0]))
        jax.tree.map(same, gradients, list(expected[1:]))
    expected = all_of(np.where(good_ids == 4, nearest, good_ids), "fill", COTANGENT)
    jax.tree.map(same, all_of(ids, "clip", COTANGENT), expected)


@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_padding_wins_over_out_of_range(mode):
    """An id that is padding is no mistake, wherever it lies, and is not clipped to a row."""
    for padding_idx in (-1, 5, 10**6, 2):
        bag = functools.partial(js.embedding_bag, combiner="sum", padding_idx=padding_idx, mode=mode)
        out, gradient = value_and_ones_gradient(lambda t, p=padding_idx, b=bag: b(t, [[3, p]]), W)
        np.testing.assert_array_equal(out, W[[3]])
        np.testing.assert_array_equal(gradient, np.eye(5)[:, [3, 3]])


def test_promise_in_bounds_reads_the_same_rows():
    np.testing.assert_array_equal(js.embedding_lookup(W, [3, 0], mode="promise_in_bounds"), W[[3, 0]])
    out = js.embedding_bag(W, IDS, offsets=OFFSETS, mode="promise_in_bounds")
    np.testing.assert_allclose(out, oracles.bag(W, IDS, offsets=OFFSETS), rtol=1e-6)


def test_ids_before_the_first_offset_are_a_mistake():
    assert np.isnan(js.embedding_bag(W, [0, 1, 2], offsets=[1, 2])).all()
    clipped = js.embedding_bag(W, [0, 1, 2], offsets=[1, 2], mode="clip")  # as if they were not there
    np.testing.assert_array_equal(clipped, W[[1, 2]])


@pytest.mark.parametrize(
    ("dtype", "x64"),
    [*((f"{u}int{bits}", False) for u in ("", "u") for bits in (8, 16, 32, 64)), ("int64", True), ("uint64", True)],
)
def test_ids_of_any_integer_type(dtype, x64):
    """Tables, batches and bags may be larger than the type can count."""
    table = np.arange(300.0, dtype=np.float32)
    with jax.enable_x64(x64):
        ids, long_ids = np.array([0, 100, 120, 7], dtype), np.arange(200)
        starts = {"offsets": np.array([0, 100, 120], dtype), "combiner": "sum"}
        lookup = functools.partial(js.embedding_lookup, table, ids)
        rows, padded, *all_rows, clipped, by_segment, by_offset = jax.jit(
            lambda: [
                lookup(),
                lookup(padding_idx=120),
                lookup(padding_idx=-1),
                lookup(padding_idx=256 + 7),
                lookup(padding_idx=2**32 + 7),
                js.embedding_lookup(table[:8], ids, mode="clip"),
                js.embedding_bag(table, ids, segment_ids=ids, num_bags=300, combiner="sum"),
                js.embedding_bag(table, long_ids, **starts),
            ]
        )()
        np.testing.assert_array_equal([rows, *all_rows], [[0, 100, 120, 7]] * 4)
        np.testing.assert_array_equal(padded, [0, 100, 0, 7])
        np.testing.assert_array_equal(clipped, [0, 7, 7, 7])
        np.testing.assert_array_equal(by_segment.nonzero()[0], [7, 100, 120])
        np.testing.assert_array_equal(by_offset, oracles.bag(table, long_ids, **starts))


def test_negative_ids_of_narrow_types_are_outside():
    table = np.ones((300, 1), np.float32)
    for dtype in (np.int8, np.int16):
        assert np.isnan(js.embedding_lookup(table, np.array([-1], dtype))).all()
        assert js.embedding_lookup(table, np.array([-1], dtype), padding_idx=-1).item() == 0


def test_wide_ids_do_not_wrap_round_to_row_0():
    message = (
        "The 'ids' argument of js.embedding_lookup must be at most 2147483647. Got 4294967296 at position 1 instead."
    )
    with pytest.raises(OverflowError, match=re.escape(message)):
        js.embedding_lookup(W, np.array([0, 2**32]))
    with pytest.raises(OverflowError, match="'offsets' argument"):
        js.embedding_bag(W, [0, 1], offsets=np.array([0, 2**32]))
    with pytest.raises(OverflowError, match="'segment_ids' argument"):
        js.embedding_bag(W, [0, 1], segment_ids=np.array([0, 2**32]), num_bags=1)
    highest = np.array([2**32 - 1], np.uint32)  # -1, had it been cast
    np.testing.assert_array_equal(js.embedding_lookup(W, highest, padding_idx=-1), [[np.nan] * 2])
    np.testing.assert_array_equal(js.embedding_lookup(W, highest, padding_idx=2**32 - 1), [[0, 0]])
    np.testing.assert_array_equal(js.embedding_lookup(W, highest, mode="clip"), W[[4]])
    with jax.enable_x64(True):
        ids = np.array([2**32, -(2**32), 2**32 + 1, 1])
        out = js.embedding_lookup(W, ids, padding_idx=2**32 + 1)
        np.testing.assert_array_equal(out, [[np.nan] * 2] * 2 + [[0, 0], W[1]])
        np.testing.assert_array_equal(js.embedding_lookup(W, ids, mode="clip"), W[[4, 0, 4, 1]])
        bags = js.embedding_bag(W, [0, 1], segment_ids=np.array([2**32, 0]), num_bags=1, combiner="sum")
        np.testing.assert_array_equal(bags, W[[1]])


# ---------------------------------------------------------------------------------------------------------------------
# NaN, infinity, zero


@pytest.mark.parametrize("combiner", COMBINERS)
@pytest.mark.parametrize("layout", ["padded", "offsets", "shuffled segments"])
def test_empty_bags_are_zero_and_finite(combiner, layout):
    """Also where padding's own row and weight are NaN: what is left out is not read, not even times zero."""
    kwargs, weights = layouts(1)[layout]
    table = W.copy()
    table[1] = np.nan
    weights = np.where(kwargs["ids"] == 1, np.nan, weights).astype(np.float32)
    weights = None if combiner == "max" else weights
    out, vjp = jax.vjp(lambda t, w: js.embedding_bag(t, combiner=combiner, weights=w, **kwargs), table, weights)
    np.testing.assert_array_equal(out[jnp.array([0, 2, 4])], np.zeros((3, 2)))
    assert np.isfinite(out).all()
    for gradient in jax.tree.leaves(vjp(COTANGENT)):
        assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(vjp(COTANGENT)[0][1], [0, 0])


@pytest.mark.parametrize("combiner", COMBINERS)
def test_ids_without_any_bag(combiner):
    weights = None if combiner == "max" else np.ones(2, np.float32)
    for where in (
        {"offsets": []},
        {"offsets": [0], "include_last_offset": True},
        {"segment_ids": [0, 1], "num_bags": 0},
    ):
        bag = functools.partial(js.embedding_bag, ids=[1, 2], combiner=combiner, **where)
        out, *gradients = value_and_ones_gradient(lambda t, w, b=bag: b(t, weights=w), W, weights)
        assert out.shape == (0, 2) and not any(g.any() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("layout", ["padded", "offsets"])
@pytest.mark.parametrize(("combiner", "weights"), [("mean", [1, -1]), ("mean", [0, 0]), ("sqrtn", [0, 0])])
def test_weights_that_sum_to_zero(combiner, weights, layout):
    """TensorFlow's div_no_nan: 0, and here no gradient either."""
    where = {"ids": [[0, 1]]} if layout == "padded" else {"ids": [0, 1], "offsets": [0]}
    weights = np.array([weights] if layout == "padded" else weights, np.float32)
    out, vjp = jax.vjp(lambda t, w: js.embedding_bag(t, weights=w, combiner=combiner, **where), W, weights)
    np.testing.assert_array_equal(out, [[0, 0]])
    for gradient in vjp(jnp.ones_like(out)):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))
    signed = js.embedding_bag(W, weights=np.full_like(weights, -2), combiner="mean", **where)
    np.testing.assert_allclose(signed, W[:2].mean(0, keepdims=True))  # negative is not zero


INF, NAN = np.inf, np.nan
MAX_TABLE = np.array(
    [[-INF, -2.0, NAN], [-INF, -5.0, 1.0], [3.0, -2.0, NAN], [9.0, 9.0, 9.0], [0.0, -0.0, -INF]], np.float32
)


@pytest.mark.parametrize("layout", ["padded", "offsets", "segments"])
@pytest.mark.parametrize(
    ("ids", "out", "winners"),  # 8 is padding; winners: the row that gets each column's gradient
    [
        ([1, 8, 8], [-INF, -5, 1], [1, 1, 1]),
        ([8, 8, 1], [-INF, -5, 1], [1, 1, 1]),
        ([8, 1, 0], [-INF, -2, NAN], [1, 0, 0]),
        ([0, 1, 0], [-INF, -2, NAN], [0, 0, 0]),
        ([1, 2, 2], [3, -2, NAN], [2, 2, 2]),
        ([2, 0, 8], [3, -2, NAN], [2, 2, 2]),
        ([0, 2, 8], [3, -2, NAN], [2, 0, 0]),
        ([8, 4, 8], [0, 0, -INF], [4, 4, 4]),
        ([8, 8, 8], [0, 0, 0], [None] * 3),
    ],
)
def test_max_of_the_infinite_the_negative_and_nan(ids, out, winners, layout):
    """-inf is a value, padding none; NaN is above all; the first of equals has the gradient."""
    n = len(ids)
    where = {
        "padded": {"ids": [ids, [3] * n]},
        "offsets": {"ids": ids + [3] * n, "offsets": [0, n]},
        "segments": {"ids": [3] * n + ids, "segment_ids": [1] * n + [0] * n, "num_bags": 2},
    }[layout]
    got, vjp = jax.vjp(lambda t: js.embedding_bag(t, combiner="max", padding_idx=8, **where), MAX_TABLE)
    np.testing.assert_array_equal(got, [out, [9, 9, 9]])
    want = np.zeros_like(MAX_TABLE)
    want[3] = 7
    for column, row in enumerate(winners):
        if row is not None:
            want[row, column] = 10 + column
    np.testing.assert_array_equal(vjp(jnp.array([[10.0, 11.0, 12.0], [7.0, 7.0, 7.0]]))[0], want)


# ---------------------------------------------------------------------------------------------------------------------
# what a row-sparse gradient sees


@pytest.mark.parametrize(
    ("kwargs", "touched"),
    [
        ({"ids": [[3, 2], [0, 2]], "padding_idx": 2}, [3, 0]),
        ({"ids": [[3, -1], [0, 4]], "padding_idx": -1}, [3, 0, 4]),
        ({"ids": [[3, 9], [0, -9]]}, [3, 0]),
        ({"ids": [[3, 9], [0, -9]], "mode": "clip"}, [3, 4, 0, 0]),
        ({"ids": [3, 1, 2, 0], "segment_ids": [0, 2, -1, 1], "num_bags": 2}, [3, 0]),
        ({"ids": [3, 1, 2], "offsets": [0, 1, 2], "include_last_offset": True}, [3, 1]),
    ],
)
@pytest.mark.parametrize("combiner", ["mean", "max"])
def test_what_is_left_out_is_not_touched(kwargs, touched, combiner):
    """Its gradient is 0 in any case; that its id is no row either keeps a lazy optimizer away from that row."""
    gradient = js.grad(lambda t: jnp.sum(js.embedding_bag(t, combiner=combiner, **kwargs)))(W)
    assert [i for i in gradient.ids.tolist() if i != 5] == touched


def test_the_gradient_of_an_empty_batch_is_row_sparse():
    for combiner in COMBINERS:
        for shape in ((0, 0), (0, 2), (2, 0)):
            ids = np.zeros(shape, int)
            gradient = js.grad(lambda t, i=ids, c=combiner: jnp.sum(js.embedding_bag(t, i, combiner=c)))(W)
            assert isinstance(gradient, js.RowSparse) and gradient.ids.shape == (0,)


# ---------------------------------------------------------------------------------------------------------------------
# errors

BAG = "argument of js.embedding_bag must be "
ERRORS = {
    "ids float": (
        TypeError, {"ids": np.ones((1, 2))},
        f"The 'ids' {BAG}an integer array. Got ids.dtype=dtype('float64') instead. Cast it: ids.astype('int32').",
    ),
    "ids one-dimensional": (
        ValueError, {"ids": [1, 2]},
        f"The 'ids' {BAG}of shape (B, L). Got ids.shape=(2,) instead. One-dimensional ids need offsets= or "
        "segment_ids=; single ids without bags want js.embedding_lookup.",
    ),
    "ids two-dimensional": (
        ValueError, {"ids": [[1]], "offsets": [0]},
        f"The 'ids' {BAG}of shape (N,) with offsets or segment_ids. Got ids.shape=(1, 1) instead.",
    ),
    "table of integers": (
        TypeError, {"table": np.ones((2, 2), int)},
        f"The 'table' {BAG}a floating-point array. Got x.dtype=dtype('int32') instead.",
    ),
    "table a scalar": (
        ValueError, {"table": 1.0},
        f"The 'table' {BAG}an array of shape (num_rows, ...). Got table.shape=() instead.",
    ),
    "combiner": (
        ValueError, {"combiner": "avg"},
        f"The 'combiner' {BAG}one of 'sum', 'mean', 'sqrtn', 'max'. Got 'avg' instead.",
    ),
    "mode": (
        ValueError, {"mode": "wrap"},
        f"The 'mode' {BAG}one of 'fill', 'drop', 'clip', 'promise_in_bounds'. Got 'wrap' instead.",
    ),
    "two layouts": (
        ValueError, {"ids": [1], "offsets": [0], "segment_ids": [0], "num_bags": 1},
        f"The 'segment_ids' {BAG}None when offsets are given. Got both instead. Give one layout.",
    ),
    "num_bags missing": (
        ValueError, {"ids": [1], "segment_ids": [0]},
        f"The 'num_bags' {BAG}given with segment_ids, and only there. Got None instead.",
    ),
    "num_bags with offsets": (
        ValueError, {"ids": [1], "offsets": [0], "num_bags": 1},
        f"The 'num_bags' {BAG}given with segment_ids, and only there. Got 1 instead.",
    ),
    "num_bags negative": (
        ValueError, {"ids": [1], "segment_ids": [0], "num_bags": -2},
        f"The 'num_bags' {BAG}a Python int, 0 or more. Got -2 instead. "
        "It is a shape, which cannot be traced: under jax.jit, make it static.",
    ),
    "segment_ids of another length": (
        ValueError, {"ids": [1, 2], "segment_ids": [0], "num_bags": 1},
        f"The 'segment_ids' {BAG}of the shape of ids, (2,). Got segment_ids.shape=(1,) instead.",
    ),
    "offsets a matrix": (
        ValueError, {"ids": [1, 2], "offsets": [[0]]},
        f"The 'offsets' {BAG}of shape (B,), or (B + 1,) with include_last_offset. Got offsets.shape=(1, 1) instead.",
    ),
    "offsets without a last one": (
        ValueError, {"ids": [1, 2], "offsets": [], "include_last_offset": True},
        f"The 'offsets' {BAG}of shape (B,), or (B + 1,) with include_last_offset. Got offsets.shape=(0,) instead.",
    ),
    "include_last_offset": (
        ValueError, {"include_last_offset": True},
        f"The 'include_last_offset' {BAG}False without offsets. Got True instead.",
    ),
    "weights of max": (
        ValueError, {"weights": np.ones((1, 2)), "combiner": "max"},
        f"The 'weights' {BAG}None with combiner='max'. Got weights instead. Use sum, mean or sqrtn.",
    ),
    "weights of another shape": (
        ValueError, {"weights": np.ones(2)},
        f"The 'weights' {BAG}of the shape of ids, (1, 2). Got weights.shape=(2,) instead.",
    ),
    "weights of integers": (
        TypeError, {"weights": np.ones((1, 2), np.int32)},
        f"The 'weights' {BAG}a floating-point array. Got x.dtype=dtype('int32') instead.",
    ),
    "padding_idx": (
        TypeError, {"padding_idx": 1.0}, f"The 'padding_idx' {BAG}an integer or None. Got 1.0 instead.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_to_do(name):
    error, kwargs, message = ERRORS[name]
    with pytest.raises(error) as caught:
        js.embedding_bag(**{"table": W, "ids": [[1, 2]], **kwargs})
    assert str(caught.value) == message


def test_errors_of_lookup():
    lookup = "argument of js.embedding_lookup must be "
    with pytest.raises(TypeError, match=f"'ids' {lookup}an integer array"):
        js.embedding_lookup(W, [True])
    with pytest.raises(TypeError, match=f"'table' {lookup}a floating-point array"):
        js.embedding_lookup(W.astype(int), [1])
    with pytest.raises(ValueError, match=f"'mode' {lookup}one of"):
        js.embedding_lookup(W, [1], mode="wrap")
    with pytest.raises(TypeError, match=f"'padding_idx' {lookup}an integer or None. Got '1' instead"):
        js.embedding_lookup(W, [1], padding_idx="1")


def test_a_traced_num_bags_is_an_error():
    with pytest.raises(ValueError, match="a shape, which cannot be traced"):
        jax.jit(lambda n: js.embedding_bag(W, [1], segment_ids=[0], num_bags=n))(1)
