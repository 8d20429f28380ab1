"""embedding_lookup and embedding_bag against NumPy, dense gradients and the values of torch and TensorFlow."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsparse as js
from tests import oracles

COMBINERS = ("sum", "mean", "sqrtn", "max")
LAYOUT_ARRAYS = ("ids", "offsets", "segment_ids")
SEEDS = st.integers(0, 2**32 - 1)  # values are drawn in a few fixed shapes, which compile once
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}


def in_one_program(*cases):
    """Of case -> (function, its arguments): case -> the results, all cases together being one program that runs once.

    What costs is to compile, and one large program costs less than many small ones.
    """

    def decorate(build):
        @functools.cache
        def results():
            functions, arguments = zip(*(build(*case) for case in cases), strict=True)
            program = jax.jit(lambda arguments: [f(*a) for f, a in zip(functions, arguments, strict=True)])
            return dict(zip(cases, jax.device_get(program(arguments)), strict=True))

        return lambda *case: results()[case]

    return decorate


def value_and_vjp(table, weights, cotangent, **kwargs):
    """The bag, its table's gradient and that of the weights: for in_one_program. No cotangent: that of the sum."""
    arrays = {k: np.asarray(kwargs.pop(k)) for k in LAYOUT_ARRAYS if np.size(kwargs.get(k, []))}  # but [] stays a list

    def both(table, weights, cotangent, arrays):
        out, vjp = jax.vjp(lambda t, w: js.embedding_bag(t, weights=w, **arrays, **kwargs), table, weights)
        return out, *vjp(jnp.ones_like(out) if cotangent is None else cotangent)

    return both, (table, weights, cotangent, arrays)


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


def layout_arrays(kwargs):
    return {k: np.asarray(kwargs[k]) for k in LAYOUT_ARRAYS if k in kwargs}


def bag_function(layout, combiner, mode):
    """Of table, weights (which max leaves alone), ids, offsets or segment_ids, and padding_idx: the bag."""
    static = {k: v for k, v in layouts(None)[layout][0].items() if k not in (*LAYOUT_ARRAYS, "padding_idx")}
    static |= {"combiner": combiner, "mode": mode}

    def bag(table, weights, arrays, padding_idx):
        weights = None if combiner == "max" else weights
        return js.embedding_bag(table, weights=weights, padding_idx=padding_idx, **arrays, **static)

    return bag


@jax.jit
def every_bag_program(by_layout, padding_idx, cotangent):
    cases = itertools.product(["padded", "offsets", "shuffled segments"], COMBINERS, ["fill", "clip"])
    results = {}
    for case in [*cases, ("last offset", "sum", "fill"), ("last offset", "max", "fill")]:
        table, weights, arrays = by_layout[case[0]]
        bag = functools.partial(bag_function(*case), arrays=arrays, padding_idx=padding_idx)
        out, vjp = jax.vjp(bag, table, weights)
        results[case] = out, *vjp(cotangent)
    return results


def every_bag(by_layout, padding_idx, cotangent=COTANGENT):
    """{(layout, combiner, mode): the bag, and its gradients with respect to table and weights}."""
    return jax.device_get(every_bag_program(by_layout, padding_idx, cotangent))


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


@jax.jit
def torch_program(table, cotangent, by_layout):
    results = {}
    for key, layout in itertools.product(TORCH, by_layout):
        combiner, padding_idx = key
        static = {k: v for k, v in layouts(padding_idx)[layout][0].items() if k not in LAYOUT_ARRAYS}
        arrays = by_layout[layout][padding_idx is None]
        out, vjp = jax.vjp(functools.partial(js.embedding_bag, combiner=combiner, **arrays, **static), table)
        results[layout, *map(str, key)] = out, *vjp(cotangent)
    return results


@functools.cache
def torch_bags(shuffled):
    """{(layout, combiner, padding_idx): the bags and the table's gradient}, segments being shuffled or not."""
    by_layout = {layout: [layout_arrays(layouts(padding)[layout][0]) for padding in (1, None)] for layout in LAYOUTS}
    segments = by_layout.pop("segments")  # the program of the shuffled ones serves both
    if not shuffled:
        by_layout["shuffled segments"] = segments
    return jax.device_get(torch_program(W, COTANGENT, by_layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("combiner", "padding_idx"), TORCH)
def test_torch_embedding_bag(combiner, padding_idx, layout):
    program = "shuffled segments" if layout == "segments" else layout
    out, table_gradient = torch_bags(layout != "segments")[program, combiner, str(padding_idx)]
    filled, gradient = TORCH[combiner, padding_idx]
    np.testing.assert_allclose(out, [[0, 0], filled[0], [0, 0], filled[1], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(table_gradient, gradient, rtol=1e-6)


@in_one_program(*((combiner,) for combiner in COMBINERS))
def torch_only_empty_bags(combiner):
    cotangent = np.full((3, 2), 99.0, np.float32)
    return value_and_vjp(W, None, cotangent, ids=[], offsets=[0, 0, 0], combiner=combiner)


@pytest.mark.parametrize("combiner", COMBINERS)
def test_torch_only_empty_bags(combiner):
    out, gradient, _ = torch_only_empty_bags(combiner)
    np.testing.assert_array_equal(out, np.zeros((3, 2)))
    np.testing.assert_array_equal(gradient, np.zeros((5, 2)))


@functools.cache
def torch_weighted(shuffled):
    """The weighted bags in every layout, segments being shuffled or not."""
    arguments = {layout: (W, weights, layout_arrays(kwargs)) for layout, (kwargs, weights) in layouts(None).items()}
    if not shuffled:
        arguments["shuffled segments"] = arguments["segments"]
    return every_bag(arguments, -1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_per_sample_weights(layout):
    _, weights = layouts(None)[layout]
    program = "shuffled segments" if layout == "segments" else layout
    out, table_gradient, weight_gradient = torch_weighted(layout != "segments")[program, "sum", "fill"]
    np.testing.assert_allclose(out, [[0, 0], [6.5, 8], [0, 0], [12, 16], [0, 0]])
    np.testing.assert_allclose(table_gradient, [[9, 12], [1, 2], [0, 0], [0.5, 1], [3, 4]])
    by_weight = dict(zip([0.5, -1.0, 2.0, 0.0, 1.0, 3.0], [23, 11, 11, 25, 67, 11], strict=True)) | {77.0: 0}
    np.testing.assert_allclose(weight_gradient, np.vectorize(by_weight.get)(weights))


MAX_LAYOUTS = ({"offsets": [0]}, {"segment_ids": [0, 0, 0], "num_bags": 1}, {})


@functools.cache
def gradients_of_equals():
    """Of a table and three ids: the gradient of their maximum, in each layout."""

    def gradients(table, ids):
        of_bag = lambda t, where: js.embedding_bag(t, ids if where else ids[None], combiner="max", **where).sum()  # noqa: E731
        return [jax.grad(of_bag)(table, where) for where in MAX_LAYOUTS]

    return jax.jit(gradients)


@pytest.mark.parametrize("table", [[1, 1, 1], [2, 2, 1]])
@pytest.mark.parametrize(("ids", "gradient"), [([0, 1, 2], [1, 0, 0]), ([1, 0, 2], [0, 1, 0])])
@pytest.mark.parametrize("layout", MAX_LAYOUTS)
def test_torch_max_gives_its_gradient_to_the_first_of_equals(table, ids, gradient, layout):
    by_layout = gradients_of_equals()(np.array(table, np.float32)[:, None], np.array(ids))
    np.testing.assert_array_equal(by_layout[MAX_LAYOUTS.index(layout)], np.array(gradient)[:, None])


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


@in_one_program(*TF)
def tensorflow_bag(combiner, weighted):
    ids = TF_IDS
    if weighted and combiner != "sum":  # the "safe" of TensorFlow also prunes weights <= 0 here; js leaves them alone
        ids = np.where(TF_WEIGHTS > 0, TF_IDS, -1)
    bag = functools.partial(js.embedding_bag, segment_ids=TF_BAGS, num_bags=5, combiner=combiner, padding_idx=-1)
    weights = TF_WEIGHTS if weighted else None
    return lambda t, i, w: bag(t, i, weights=w), (TF_TABLE, ids, weights)


@pytest.mark.parametrize(("combiner", "weighted"), TF)
def test_tensorflow_safe_embedding_lookup_sparse(combiner, weighted):
    out = tensorflow_bag(combiner, weighted)
    first = TF[combiner, weighted]
    np.testing.assert_allclose(out[:, 0], [first[0], 0, 0, first[1], first[2]], rtol=1e-6)
    step = (out[:, 1:] - out[:, :-1]).T  # all columns of TF_TABLE are one apart
    np.testing.assert_allclose(step, np.broadcast_to(step[0], step.shape), rtol=1e-5)


@in_one_program(("sum",), ("mean",), ("sqrtn",))
def tensorflow_missing_bags(combiner):
    bags = functools.partial(js.embedding_bag, ids=[0, 2], segment_ids=[1, 3], num_bags=4, combiner=combiner)
    return lambda table, weights: bags(table, weights=weights), (np.ones((4, 5), np.float32), np.ones(2))


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_tensorflow_missing_bags(combiner):
    """EmbeddingLookupSparseTest.testMissingInSparseIds: bags 1 and 3 hold an id of a table of ones, 0 and 2 none."""
    out = tensorflow_missing_bags(combiner)
    np.testing.assert_array_equal(out, np.broadcast_to([[0.0], [1.0], [0.0], [1.0]], (4, 5)))


# ---------------------------------------------------------------------------------------------------------------------
# any shape, against the oracle and against a dense program


def value_and_ones_gradient(f, *args):
    """f(*args), and the gradient of its sum."""
    out, vjp = jax.vjp(f, *args)
    return out, *vjp(jnp.ones_like(out))


def dense_bag(table, weights, ids, member, combiner):
    """The bag as anyone would write it without us: a dense S, and S @ table. member: which bag reads which position."""
    num_bags, size = member.shape
    rows = (ids.reshape(-1, 1) == jnp.arange(len(table))[None]).astype(table.dtype) @ table.reshape(len(table), -1)
    if combiner == "max":
        best = jnp.max(jnp.where(member[:, :, None], rows[None], -jnp.inf), axis=1, initial=-jnp.inf)
        out = jnp.where(member.any(1)[:, None], best, 0)
    else:
        s = member * (jnp.ones(size) if weights is None else weights.reshape(-1))[None]
        norm = {"sum": jnp.ones(num_bags), "mean": s.sum(1), "sqrtn": jnp.sqrt(jnp.where(s.any(1), (s**2).sum(1), 1))}
        norm = jnp.where(s.any(1) | (combiner == "sum"), norm[combiner], jnp.inf)
        out = s @ rows / norm[:, None]
    return out.reshape(num_bags, *table.shape[1:])


EDGES = [  # layout, shape of ids, number of bags: empty bags, no bags, no ids
    *(("padded", (bags, length), bags) for bags, length in [(0, 2), (3, 0), (1, 1)]),
    *(("offsets", (n,), bags) for n, bags in [(0, 0), (2, 0), (0, 2)]),
    *((layout, (n,), bags) for layout in ("last", "segments") for n, bags in [(0, 2), (2, 0)]),
]
SHAPES = [("padded", (3, 4), 3), *((layout, (7,), 3) for layout in ("offsets", "last", "segments"))]


@functools.cache
def bag_cases():
    """Every layout with every combiner, and the edges with two of them; what else there is to choose is drawn."""
    rng, cases = np.random.default_rng(0), []
    every = [(shape, COMBINERS[(i + j) % 4]) for i, shape in enumerate(SHAPES) for j in range(4)]
    edges = [(shape, COMBINERS[(i + j) % 4]) for i, shape in enumerate(EDGES) for j in (0, 2)]
    for (layout, shape, num_bags), combiner in every + edges:
        num_rows, tail = ((7, (2, 2)), (2, (3,)), (1, ()))[rng.integers(3)]
        case = {"layout": layout, "shape": shape, "num_bags": num_bags, "table": (num_rows, *tail)}
        case["padding_idx"] = (None, 0, num_rows - 1, num_rows, -1, 2**40)[rng.integers(6)]
        case["weighted"] = combiner != "max" and bool(rng.integers(2))
        case["mode"] = ("fill", "clip")[rng.integers(2)]
        case["dtype"] = ("float32", "bfloat16", "float16")[rng.integers(3)]
        cases.append({"combiner": combiner, **case})
    return cases


def drawn_arguments(case, seed, dtype, outside_ids=()):
    """A table, weights or None, and ids with the arrays that say where their bags are."""
    rng, shape = np.random.default_rng(seed), case["shape"]
    num_bags, padding_idx = case["num_bags"], case["padding_idx"]
    table = (rng.normal(size=case["table"]) + 0.1).astype(dtype)
    weights = None
    if case["weighted"]:
        weights = (rng.choice([1, 1, 0]) * rng.uniform(0.5, 1.5, shape)).astype(dtype)  # or a sum of zero
    padding = [] if padding_idx is None or padding_idx > 2**31 else [padding_idx] * 2
    arrays = {"ids": rng.choice([*range(len(table)), *padding, *outside_ids], shape).astype(np.int32)}
    if case["layout"] == "segments":
        arrays["segment_ids"] = rng.integers(-1, num_bags + 1, shape).astype(np.int32)
    elif case["layout"] != "padded":
        ends = np.sort(rng.integers(0, shape[0] + 1, num_bags)).astype(np.int32)
        starts = np.concatenate([[0], ends])
        arrays["offsets"] = starts if case["layout"] == "last" else starts[:-1]
    return table, weights, arrays


def static_arguments(case):
    static = {k: case[k] for k in ("combiner", "padding_idx", "mode")}
    if case["layout"] == "segments":
        static["num_bags"] = case["num_bags"]
    return static | ({"include_last_offset": True} if case["layout"] == "last" else {})


@jax.jit
def every_case(arguments):
    by_case = zip(bag_cases(), arguments, strict=True)
    return [js.embedding_bag(t, weights=w, **arrays, **static_arguments(case)) for case, (t, w, arrays) in by_case]


@settings(max_examples=10)
@given(seed=SEEDS, outside=st.sampled_from([(), (-3, 7)]))
def test_bag_equals_the_oracle(seed, outside):
    arguments = [drawn_arguments(case, seed, case["dtype"], outside) for case in bag_cases()]
    for case, (table, weights, arrays), got in zip(bag_cases(), arguments, every_case(arguments), strict=True):
        want = oracles.bag(table, weights=weights, **arrays, **static_arguments(case))
        assert got.dtype == table.dtype and got.shape == want.shape, case
        close = TOLERANCE[case["dtype"]]
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=close, atol=close, err_msg=str(case))


def dense_arguments(case, seed):
    """What dense_bag takes, with all of the bag's own arrays, and a cotangent."""
    table, weights, arrays = drawn_arguments(case, seed, "float64")
    where = {k: v for k, v in static_arguments(case).items() if k in ("num_bags", "include_last_offset")}
    ids, bags = arrays["ids"].reshape(-1), oracles.positions(**arrays, **where)
    member = [[i in bag and ids[i] != case["padding_idx"] for i in range(ids.size)] for bag in bags]
    cotangent = np.random.default_rng(seed).normal(size=(len(bags), *table.shape[1:]))
    return table, weights, arrays, np.array(member, bool).reshape(len(bags), ids.size), cotangent


def ours_and_dense(case, table, weights, arrays, member, cotangent):
    """Two gradients: of the bag, and of dense_bag."""
    static = static_arguments(case)
    ours = lambda t, w: jnp.vdot(cotangent, js.embedding_bag(t, weights=w, **arrays, **static))  # noqa: E731
    plain = lambda t, w: jnp.vdot(cotangent, dense_bag(t, w, arrays["ids"], member, static["combiner"]))  # noqa: E731
    return [jax.grad(f, (0,) if weights is None else (0, 1))(table, weights) for f in (ours, plain)]


# of each layout two combiners, of each edge one
every_gradient = jax.jit(
    lambda args: [ours_and_dense(case, *a) for case, a in zip(bag_cases()[::2], args, strict=True)]
)


@pytest.mark.slow
@settings(max_examples=10)
@given(seed=SEEDS)
def test_bag_gradients_equal_those_of_a_dense_program(seed):
    with jax.enable_x64(True):
        results = every_gradient([dense_arguments(case, seed) for case in bag_cases()[::2]])
        for case, (got, want) in zip(bag_cases()[::2], results, strict=True):
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12, err_msg=str(case))


def directional_derivatives(f, args, tangents, cotangent, eps):
    """Of f along the tangents, by jax.jvp and by differences; and its product with a cotangent, by jax.vjp."""
    _, forward = jax.jvp(f, args, tangents)
    backward = jax.vjp(f, *args)[1](cotangent)
    both = jax.lax.map(lambda e: f(*jax.tree.map(lambda x, v: x + e * v, args, tangents)), jnp.array([eps, -eps]))
    inner = lambda a, b: sum(map(jnp.vdot, jax.tree.leaves(a), jax.tree.leaves(b)))  # noqa: E731
    difference = jax.tree.map(lambda x: (x[0] - x[1]) / (2 * eps), both)
    return (forward, inner(backward, tangents)), (difference, inner(cotangent, difference))


DIFFERENTIATED = [
    *(("sum", "padded"), ("mean", "offsets"), ("sqrtn", "padded")),
    *(("max", "padded"), ("max", "shuffled segments")),
]


@in_one_program(*DIFFERENTIATED)
def bag_derivatives(combiner, layout):
    kwargs, weights = layouts(None)[layout]
    rng = np.random.default_rng(0)
    weights = weights.astype(np.float64) + 0.25  # off zero, where sqrtn has a corner
    args = (rng.normal(size=(5, 2)), None if combiner == "max" else weights)
    tangents = jax.tree.map(lambda x: rng.normal(size=x.shape), args)
    bag = lambda t, w: js.embedding_bag(t, weights=w, combiner=combiner, **kwargs)  # noqa: E731
    return functools.partial(directional_derivatives, bag, eps=1e-5), (args, tangents, rng.normal(size=(5, 2)))


@pytest.mark.slow
@pytest.mark.parametrize(("combiner", "layout"), DIFFERENTIATED)
def test_bag_derivatives_equal_finite_differences(combiner, layout):
    """In float64, forward and reverse, with respect to table and weights."""
    with jax.enable_x64(True):
        got, want = bag_derivatives(combiner, layout)
    assert got[0].dtype == np.float64
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-7), got, want)


@functools.cache
def lookup_cases():
    """Every shape of ids with three tables; mode, padding_idx and dtype are drawn."""
    rng = np.random.default_rng(0)
    ids, tables = [(), (0,), (4,), (2, 0), (2, 3), (1, 2, 2)], [(1,), (6,), (6, 2), (6, 2, 3)]
    shapes = [(shape, tables[(i + j) % 4]) for i, shape in enumerate(ids) for j in range(3)]
    choices = ("fill", "clip"), (None, 0, 5, 6, -1, 10**12), ("float32", "bfloat16", "float16")
    return [(*case, *(choice[rng.integers(len(choice))] for choice in choices)) for case in shapes]


def value_and_gradient_of_lookup(case, table, ids):
    _, _, mode, padding_idx, _ = case
    return value_and_ones_gradient(lambda t: js.embedding_lookup(t, ids, padding_idx=padding_idx, mode=mode), table)


every_lookup = jax.jit(
    lambda args: [value_and_gradient_of_lookup(case, *a) for case, a in zip(lookup_cases(), args, strict=True)]
)


@settings(max_examples=10)
@given(seed=SEEDS)
def test_lookup_equals_the_oracle(seed):
    rng = np.random.default_rng(seed)
    arguments = [
        (rng.normal(size=table_shape).astype(dtype), rng.integers(-2, table_shape[0] + 2, shape).astype(np.int32))
        for shape, table_shape, _, _, dtype in lookup_cases()
    ]
    for case, (table, ids), (out, got) in zip(lookup_cases(), arguments, every_lookup(arguments), strict=True):
        _, table_shape, mode, padding_idx, _ = case
        assert out.dtype == table.dtype, case
        want = oracles.lookup(table, ids, padding_idx, mode)
        np.testing.assert_array_equal(np.asarray(out, np.float64), want, err_msg=str(case))
        gradient = np.zeros(table_shape)
        for i in ids.reshape(-1):
            row = min(max(int(i), 0), table_shape[0] - 1) if mode == "clip" else int(i)
            if i != padding_idx and 0 <= row < table_shape[0]:
                gradient[row] += 1
        np.testing.assert_array_equal(np.asarray(got, np.float64), gradient, err_msg=str(case))


# ---------------------------------------------------------------------------------------------------------------------
# jit, vmap, dtypes


BATCHED = [
    *((c, "padded") for c in COMBINERS),
    *(("sqrtn", "offsets"), ("max", "last offset"), ("mean", "shuffled segments")),
]


@functools.cache
def batched_bags():
    """Of BATCHED: value and gradient of a batch of tables, ids and weights; and of each alone."""
    rng, batches = np.random.default_rng(0), {}
    for layout, (kwargs, weights) in layouts(None).items():
        ids = np.asarray(kwargs["ids"])
        many_ids = np.stack(
            [ids, np.where(ids == 1, 2, ids), np.where(ids == 4, 9, ids)]
        )  # the last: outside the table
        arrays = {k: np.stack([kwargs[k]] * 3) for k in LAYOUT_ARRAYS if k in kwargs} | {"ids": many_ids}
        many_weights = np.stack([weights, 2 * weights + 1, weights - 3])
        batches[layout] = rng.normal(size=(3, 5, 2)).astype(np.float32), many_weights, arrays

    def both(combiner, layout, table, weights, arrays):
        static = {k: v for k, v in layouts(None)[layout][0].items() if k not in arrays}
        weights = None if combiner == "max" else weights
        bag = lambda t: js.embedding_bag(t, weights=weights, combiner=combiner, **arrays, **static)  # noqa: E731
        out, vjp = jax.vjp(bag, table)
        return out, vjp(COTANGENT)[0]

    together = jax.jit(jax.vmap(lambda batches: {case: both(*case, *batches[case[1]]) for case in BATCHED}))(batches)
    one_by_one = [every_bag(jax.tree.map(lambda x, i=i: x[i], batches), -1) for i in range(3)]
    alone = {(c, layout): [one[layout, c, "fill"] for one in one_by_one] for c, layout in BATCHED}
    return together, alone


@pytest.mark.slow
@pytest.mark.parametrize(("combiner", "layout"), BATCHED)
def test_bag_under_jit_and_vmap(combiner, layout):
    """A batch of tables, ids and weights, jitted: each as when called alone, value and gradient."""
    together, alone = (results[combiner, layout] for results in batched_bags())
    values, gradients = map(np.asarray, together)
    for i, (value, gradient, _) in enumerate(alone):
        np.testing.assert_allclose(values[i], value, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradients[i], gradient, rtol=1e-5, atol=1e-6)
    assert np.isnan(values[2, 3]).all() and np.isfinite(values[2, :3]).all() and np.isfinite(gradients).all()


def test_lookup_under_jit_and_vmap():
    ids = np.array([[0, 9], [4, -1]])
    lookup = jax.jit(jax.vmap(lambda i: js.embedding_lookup(W, i, padding_idx=-1)))
    np.testing.assert_array_equal(lookup(ids), [[W[0], [np.nan] * 2], [W[4], [0, 0]]])


def float64_arguments(combiner, layout):
    kwargs, weights = layouts(None)[layout]
    weights = None if combiner == "max" else weights.astype(np.float64) + 0.1
    return np.random.default_rng(0).normal(size=(5, 2)), weights, {"combiner": combiner, **kwargs}


@in_one_program(*itertools.product(COMBINERS, ["padded", "offsets"]))
def float64_bag(combiner, layout):
    table, weights, kwargs = float64_arguments(combiner, layout)
    return lambda t, w: js.embedding_bag(t, weights=w, **kwargs), (table, weights)


@pytest.mark.parametrize("combiner", COMBINERS)
@pytest.mark.parametrize("layout", ["padded", "offsets"])
def test_float64_stays_float64(combiner, layout):
    with jax.enable_x64(True):
        out = float64_bag(combiner, layout)
    assert out.dtype == np.float64
    table, weights, kwargs = float64_arguments(combiner, layout)
    np.testing.assert_allclose(out, oracles.bag(table, weights=weights, **kwargs), rtol=1e-13)


@in_one_program(*itertools.product(["padded", "offsets"], [61, 81]))
def bfloat16_sum(layout, length):
    ids = np.minimum(np.arange(length), 1)
    where = {"ids": ids[None]} if layout == "padded" else {"ids": ids, "offsets": np.array([0])}
    return lambda t, where: js.embedding_bag(t, combiner="sum", **where), (jnp.array([[256], [1]], jnp.bfloat16), where)


@pytest.mark.parametrize("length", [61, 81])  # unrolled, and one gather
@pytest.mark.parametrize("layout", ["padded", "offsets"])
def test_16_bit_tables_are_summed_in_float32(layout, length):
    """256 + 1 is 256 in bfloat16, so a running sum would stay there."""
    out = bfloat16_sum(layout, length)
    assert out.dtype == jnp.bfloat16 and out.item() == 256 + length - 1


@pytest.mark.cpu("others divide by multiplying")
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


def outside_arguments(layout, i):
    """The weighted bags of `layouts`, id 4 of bag 3 being i, beside padding outside the table."""
    kwargs, weights = layouts(-7)[layout]
    arrays = layout_arrays(kwargs)
    return W, weights + 0.5, {**arrays, "ids": np.where(arrays["ids"] == 4, i, arrays["ids"])}


@functools.cache
def outside_bags(i, without_bag_3=False):
    cotangent = np.where(np.arange(5)[:, None] == 3, 0, COTANGENT) if without_bag_3 else COTANGENT
    return every_bag({layout: outside_arguments(layout, i) for layout in LAYOUTS}, -7, cotangent)


@pytest.mark.parametrize(("bad", "nearest"), [(-1, 0), (5, 4)])
@pytest.mark.parametrize("combiner", COMBINERS)
@pytest.mark.parametrize("layout", ["padded", "offsets", "shuffled segments"])
def test_an_id_outside_the_table(layout, combiner, bad, nearest):
    """Bag 3 holds it. fill and drop: NaN there and no gradient from there; clip: the nearest row, gradient and all."""
    same = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    expected = outside_bags(4, without_bag_3=True)[layout, combiner, "fill"]
    out, *gradients = outside_bags(bad)[layout, combiner, "fill"]
    same(out, np.where(np.arange(5)[:, None] == 3, np.nan, expected[0]))
    jax.tree.map(same, gradients, list(expected[1:]))
    arguments = (*outside_arguments(layout, bad), -7)
    fill, drop = (jax.make_jaxpr(bag_function(layout, combiner, mode))(*arguments) for mode in ("fill", "drop"))
    assert str(fill) == str(drop)
    expected = outside_bags(nearest)[layout, combiner, "fill"]
    jax.tree.map(same, outside_bags(bad)[layout, combiner, "clip"], expected)


@in_one_program(*itertools.product((-1, 5, 10**6, 2), ("fill", "clip")))
def padding_bag(padding_idx, mode):
    kwargs = {"combiner": "sum", "padding_idx": padding_idx, "mode": mode}
    return value_and_vjp(W, None, None, ids=[[3, padding_idx]], **kwargs)


@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_padding_wins_over_out_of_range(mode):
    """An id that is padding is no mistake, wherever it lies, and is not clipped to a row."""
    for padding_idx in (-1, 5, 10**6, 2):
        out, gradient, _ = padding_bag(padding_idx, mode)
        np.testing.assert_array_equal(out, W[[3]], err_msg=f"{padding_idx=}")
        np.testing.assert_array_equal(gradient, np.eye(5)[:, [3, 3]], err_msg=f"{padding_idx=}")


def test_promise_in_bounds_reads_the_same_rows():
    rows, bags = jax.jit(
        lambda table: (
            js.embedding_lookup(table, [3, 0], mode="promise_in_bounds"),
            js.embedding_bag(table, IDS, offsets=OFFSETS, mode="promise_in_bounds"),
        )
    )(W)
    np.testing.assert_array_equal(rows, W[[3, 0]])
    np.testing.assert_allclose(bags, oracles.bag(W, IDS, offsets=OFFSETS), rtol=1e-6)


def test_ids_before_the_first_offset_are_a_mistake():
    bag = functools.partial(js.embedding_bag, ids=[0, 1, 2], offsets=[1, 2])
    filled, clipped = jax.jit(lambda table: [bag(table, mode=mode) for mode in ("fill", "clip")])(W)
    assert np.isnan(filled).all()
    np.testing.assert_array_equal(clipped, W[[1, 2]])  # as if they were not there


INTEGERS = tuple(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64))


def ids_of_type(dtype):
    ids, long_ids = np.array([0, 100, 120, 7], dtype), np.arange(200)
    return ids, long_ids, {"offsets": np.array([0, 100, 120], dtype), "combiner": "sum"}


def read_by_ids(dtype):
    ids, long_ids, starts = ids_of_type(dtype)

    def read(table):
        lookup = functools.partial(js.embedding_lookup, table, ids)
        return [
            lookup(),
            lookup(padding_idx=120),
            lookup(padding_idx=-1),
            lookup(padding_idx=256 + 7),
            lookup(padding_idx=2**32 + 7),
            js.embedding_lookup(table[:8], ids, mode="clip"),
            js.embedding_bag(table, ids, segment_ids=ids, num_bags=300, combiner="sum"),
            js.embedding_bag(table, long_ids, **starts),
        ]

    return read, (np.arange(300.0, dtype=np.float32),)


read_by_short_ids = in_one_program(*((dtype,) for dtype in INTEGERS))(read_by_ids)
read_by_long_ids = in_one_program(("int64",), ("uint64",))(read_by_ids)


@pytest.mark.parametrize(("dtype", "x64"), [*((dtype, False) for dtype in INTEGERS), ("int64", True), ("uint64", True)])
def test_ids_of_any_integer_type(dtype, x64):
    """Tables, batches and bags may be larger than the type can count."""
    with jax.enable_x64(x64):
        read = (read_by_long_ids if x64 else read_by_short_ids)(dtype)
    rows, padded, *all_rows, clipped, by_segment, by_offset = read
    np.testing.assert_array_equal([rows, *all_rows], [[0, 100, 120, 7]] * 4)
    np.testing.assert_array_equal(padded, [0, 100, 0, 7])
    np.testing.assert_array_equal(clipped, [0, 7, 7, 7])
    np.testing.assert_array_equal(by_segment.nonzero()[0], [7, 100, 120])
    _, long_ids, starts = ids_of_type(dtype)
    np.testing.assert_array_equal(by_offset, oracles.bag(np.arange(300.0, dtype=np.float32), long_ids, **starts))


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
    lookup = js.embedding_lookup
    paddings = {"padding_idx": -1}, {"padding_idx": 2**32 - 1}, {"mode": "clip"}
    out = jax.jit(lambda w: [lookup(w, highest, **kwargs) for kwargs in paddings])(W)
    np.testing.assert_array_equal(out, [[[np.nan] * 2], [[0, 0]], W[[4]]])
    with jax.enable_x64(True):
        ids = np.array([2**32, -(2**32), 2**32 + 1, 1])
        bag = functools.partial(js.embedding_bag, segment_ids=np.array([2**32, 0]), num_bags=1, combiner="sum")
        out, clipped, bags = jax.jit(
            lambda w: [lookup(w, ids, padding_idx=2**32 + 1), lookup(w, ids, mode="clip"), bag(w, [0, 1])]
        )(W)
        np.testing.assert_array_equal(out, [[np.nan] * 2] * 2 + [[0, 0], W[1]])
        np.testing.assert_array_equal(clipped, W[[4, 0, 4, 1]])
        np.testing.assert_array_equal(bags, W[[1]])


# ---------------------------------------------------------------------------------------------------------------------
# NaN, infinity, zero


@functools.cache
def bags_beside_nan():
    """Padding's own row and weights are NaN."""
    table, arguments = W.copy(), {}
    table[1] = np.nan
    for layout, (kwargs, weights) in layouts(1).items():
        arrays = layout_arrays(kwargs)
        arguments[layout] = table, np.where(arrays["ids"] == 1, np.nan, weights).astype(np.float32), arrays
    return every_bag(arguments, 1)


@pytest.mark.parametrize("combiner", COMBINERS)
@pytest.mark.parametrize("layout", ["padded", "offsets", "shuffled segments"])
def test_empty_bags_are_zero_and_finite(combiner, layout):
    """Also where padding's own row and weight are NaN: what is left out is not read, not even times zero."""
    out, *gradients = bags_beside_nan()[layout, combiner, "fill"]
    np.testing.assert_array_equal(out[[0, 2, 4]], np.zeros((3, 2)))
    assert np.isfinite(out).all()
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradients[0][1], [0, 0])


NO_BAGS = {
    "offsets": {"offsets": []},
    "last offset": {"offsets": [0], "include_last_offset": True},
    "segments": {"segment_ids": [0, 1], "num_bags": 0},
}


@in_one_program(*itertools.product(COMBINERS, NO_BAGS))
def no_bags(combiner, layout):
    weights = None if combiner == "max" else np.ones(2, np.float32)
    return value_and_vjp(W, weights, None, ids=[1, 2], combiner=combiner, **NO_BAGS[layout])


@pytest.mark.parametrize("combiner", COMBINERS)
def test_ids_without_any_bag(combiner):
    for layout in NO_BAGS:
        out, *gradients = no_bags(combiner, layout)
        assert out.shape == (0, 2) and not any(g.any() for g in jax.tree.leaves(gradients)), layout


ZERO_SUMS = [("mean", (1, -1)), ("mean", (0, 0)), ("sqrtn", (0, 0))]


@jax.jit
def weighted_pairs(table, weights):
    """Rows 0 and 1 as one bag: by combiner and layout, its value and gradients."""
    results = {}
    for combiner, layout in itertools.product(["mean", "sqrtn"], ["padded", "offsets"]):
        where = {"ids": [[0, 1]]} if layout == "padded" else {"ids": [0, 1], "offsets": [0]}
        bag = functools.partial(js.embedding_bag, combiner=combiner, **where)
        shape = np.shape(where["ids"])
        results[combiner, layout] = value_and_ones_gradient(
            lambda t, w, b=bag, s=shape: b(t, weights=w.reshape(s)), table, weights
        )
    return results


@pytest.mark.parametrize("layout", ["padded", "offsets"])
@pytest.mark.parametrize(("combiner", "weights"), ZERO_SUMS)
def test_weights_that_sum_to_zero(combiner, weights, layout):
    """TensorFlow's div_no_nan: 0, and here no gradient either."""
    out, *gradients = weighted_pairs(W, np.float32(weights))[combiner, layout]
    np.testing.assert_array_equal(out, [[0, 0]])
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))
    signed, *_ = weighted_pairs(W, np.float32([-2, -2]))["mean", layout]
    np.testing.assert_allclose(signed, W[:2].mean(0, keepdims=True))  # negative is not zero


INF, NAN = np.inf, np.nan
MAX_TABLE = np.array(
    [[-INF, -2.0, NAN], [-INF, -5.0, 1.0], [3.0, -2.0, NAN], [9.0, 9.0, 9.0], [0.0, -0.0, -INF]], np.float32
)


@functools.cache
def maximum_of_three():
    """Of three ids: the maximum of bag 0, which holds them, and of bag 1, and the gradient, in each layout."""

    def each(table, ids):
        three = jnp.full(3, 3)
        layouts = {
            "padded": {"ids": jnp.stack([ids, three])},
            "offsets": {"ids": jnp.concatenate([ids, three]), "offsets": [0, 3]},
            "segments": {"ids": jnp.concatenate([three, ids]), "segment_ids": [1] * 3 + [0] * 3, "num_bags": 2},
        }
        results = {}
        for layout, where in layouts.items():
            bag = functools.partial(js.embedding_bag, combiner="max", padding_idx=8, **where)
            out, vjp = jax.vjp(bag, table)
            results[layout] = out, vjp(jnp.array([[10.0, 11.0, 12.0], [7.0, 7.0, 7.0]]))[0]
        return results

    return jax.jit(each)


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
    got, gradient = maximum_of_three()(MAX_TABLE, np.array(ids))[layout]
    np.testing.assert_array_equal(got, [out, [9, 9, 9]])
    want = np.zeros_like(MAX_TABLE)
    want[3] = 7
    for column, row in enumerate(winners):
        if row is not None:
            want[row, column] = 10 + column
    np.testing.assert_array_equal(gradient, want)


# ---------------------------------------------------------------------------------------------------------------------
# what a row-sparse gradient sees


LEFT_OUT = [
    ({"ids": [[3, 2], [0, 2]], "padding_idx": 2}, [3, 0]),
    ({"ids": [[3, -1], [0, 4]], "padding_idx": -1}, [3, 0, 4]),
    ({"ids": [[3, 9], [0, -9]]}, [3, 0]),
    ({"ids": [[3, 9], [0, -9]], "mode": "clip"}, [3, 4, 0, 0]),
    ({"ids": [3, 1, 2, 0], "segment_ids": [0, 2, -1, 1], "num_bags": 2}, [3, 0]),
    ({"ids": [3, 1, 2], "offsets": [0, 1, 2], "include_last_offset": True}, [3, 1]),
]


@in_one_program(*itertools.product(range(len(LEFT_OUT)), ["mean", "max"]))
def row_sparse_gradient(case, combiner):
    return js.grad(lambda t: jnp.sum(js.embedding_bag(t, combiner=combiner, **LEFT_OUT[case][0]))), (W,)


@pytest.mark.parametrize(("kwargs", "touched"), LEFT_OUT)
@pytest.mark.parametrize("combiner", ["mean", "max"])
def test_what_is_left_out_is_not_touched(kwargs, touched, combiner):
    """Its gradient is 0 in any case; that its id is no row either keeps a lazy optimizer away from that row."""
    gradient = row_sparse_gradient(LEFT_OUT.index((kwargs, touched)), combiner)
    assert sorted(i for i in gradient.ids.tolist() if i < 5) == sorted(set(touched))


def test_the_gradient_of_an_empty_batch_is_row_sparse():
    cases = list(itertools.product(COMBINERS, ((0, 0), (0, 2), (2, 0))))

    def gradient(table, combiner, shape):
        return js.grad(lambda t: jnp.sum(js.embedding_bag(t, np.zeros(shape, int), combiner=combiner)))(table)

    for case, got in zip(cases, jax.jit(lambda t: [gradient(t, *key) for key in cases])(W), strict=True):
        assert isinstance(got, js.RowSparse) and (np.asarray(got.ids) >= len(W)).all(), case


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
