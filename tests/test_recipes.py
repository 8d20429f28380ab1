"""notebooks/recipes.md runs as it stands, and does what it says: with one word taken back, and by torch's numbers."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from tests import pages
from tests.marks import slow_but
from tests.stepwise import compare

PAGE = "notebooks/recipes.md"
STEPS, FUNCTIONS = map(pages.cells, pages.text(PAGE).split("## Weights from"))
IMPORTS, *STEPS = STEPS
BY_NAME = dict(zip(["linen", "nnx", "init and apply", "equinox", "jax"], STEPS, strict=True))


def run(*cells):
    return pages.run(PAGE, (IMPORTS, *cells))


@pytest.mark.parametrize("name", slow_but(["linen"], BY_NAME))
def test_one_word(name):
    """In its first step Adam, and momentum, leave rows without a gradient where they are: all of it is equal. That no
    table is read by rows would be announced, and be an error here."""
    if name == "equinox":
        pytest.importorskip("equinox")
    cell = BY_NAME[name]
    dense = cell.replace("@js.nnx.jit", "@nnx.jit").replace("@js.jit", "@jax.jit")
    assert cell.count("js.") == 1 and "js." not in dense
    got, want = run(cell), run(dense)
    compare(name, *((n["params"], n["loss"]) for n in (got, want)), 2e-6)


@functools.cache
def recipe(name):
    return run(*FUNCTIONS)[name]


def test_numpy(tmp_path):
    table = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
    np.save(tmp_path / "t.npy", table)
    got = recipe("from_npy")(tmp_path / "t.npy")
    changed = jax.jit(lambda t: t + 1, donate_argnums=0)(got)  # the file's memory is not the table's
    np.testing.assert_array_equal(changed, table + 1)
    np.testing.assert_array_equal(np.load(tmp_path / "t.npy"), table)


def test_word2vec(tmp_path):
    """As gensim writes it; the first word2vec leaves a space at the end of each line."""
    text = "3 2\n</s> 0.5 -1\nNew York 0.25 2e-3 \nécole 3 4\n"
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    words, table = recipe("from_word2vec")(tmp_path / "t.txt")
    assert words == {"</s>": 0, "New York": 1, "école": 2}
    np.testing.assert_array_equal(table, np.array([[0.5, -1], [0.25, 0.002], [3, 4]], np.float32))
    given = recipe("with_pretrained")(jnp.zeros((4, 2)), {"a": 0, "école": 3, "</s>": 1}, words, table)
    np.testing.assert_array_equal(given, np.array([[0, 0], [0.5, -1], [0, 0], [3, 4]], np.float32))
    none = recipe("with_pretrained")(jnp.ones((4, 2)), {"a": 0}, words, table)
    np.testing.assert_array_equal(none, np.ones((4, 2)))


class Loader:
    """A stand-in for datasets.Dataset.iter and tf.data's as_numpy_iterator: dicts of new NumPy arrays, of one shape."""

    def __init__(self, columns, size):
        self.columns, self.size = columns, size

    def __iter__(self):
        for at in range(0, len(self.columns["label"]) - self.size + 1, self.size):
            yield {name: np.array(column[at : at + self.size]) for name, column in self.columns.items()}


def test_batches_of_other_loaders():
    """They are those of js.batches; in a step of optax.sgd, js.jit and jax.jit are equal in every row."""
    rng, n, rows = np.random.default_rng(0), 70, 1000
    words = [[f"w{w}" for w in rng.zipf(1.5, rng.integers(0, 9)) % 50] for _ in range(n)]
    users = [f"u{u}" for u in rng.integers(0, 20, n)]
    labels = rng.integers(0, 2, n)
    columns = recipe("prepared")({"words": words, "user": users, "label": labels})
    assert columns["ids"].shape == (n, 8) and columns["label"].dtype == np.float32
    x = {"ids": js.hash_ids(words, rows), "user": js.hash_ids(users, rows)}
    (batch,) = js.batches(x, labels.astype(np.float32), batch_size=n, num_rows=rows)
    width = batch.x["ids"].shape[1]
    np.testing.assert_array_equal(columns["ids"][:, :width], batch.x["ids"])
    assert (columns["ids"][:, width:] == rows).all()
    results = []
    for word in "js.jit", "jax.jit":
        cells = [cell.replace("@js.jit", f"@{word}") for cell in FUNCTIONS]
        namespace = run(*cells)
        namespace["tx"] = optax.sgd(0.5)
        params = {"words": 0.1 * jnp.ones((rows, 4)), "users": 0.1 * jnp.ones((rows, 4)), "head": jnp.arange(4.0)}
        results.append(namespace["train_on_dicts"](params, Loader(columns, 16)))
        assert len(results[-1][1]) == 4
    compare("loader", *results, 1e-6)


# What safetensors 0.8.0 makes of {"embed.weight": arange(6).reshape(3, 2) / 4, "half": [1.5, -2], "ids": [7, -1]}.
SAFETENSORS = (
    b'\xd8\0\0\0\0\0\0\0{"__metadata__":{"format":"np"},"ids":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},'
    b'"embed.weight":{"dtype":"F32","shape":[3,2],"data_offsets":[16,40]},"half":{"dtype":"F16","shape":[2],'
    b'"data_offsets":[40,44]}}  \x07\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff\0\0\0\0\0\0\x80>\0\0\0?\0\0@?\0\0'
    b"\x80?\0\0\xa0?\0>\0\xc0"
)


def test_safetensors(tmp_path):
    (tmp_path / "t").write_bytes(SAFETENSORS)
    got = recipe("from_safetensors")(tmp_path / "t")
    assert set(got) == {"embed.weight", "half", "ids"} and got["half"].dtype == jnp.float16
    np.testing.assert_array_equal(got["embed.weight"], np.arange(6).reshape(3, 2) / 4)
    np.testing.assert_array_equal(got["half"], [1.5, -2])
    np.testing.assert_array_equal(got["ids"], [7, -1])
    header = json.dumps({"b": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "b").write_bytes(len(header).to_bytes(8, "little") + header + b"\xc0\x3f")  # 0x3fc0 is 1.5
    got = recipe("from_safetensors")(tmp_path / "b")["b"]
    assert got.dtype == jnp.bfloat16 and got.tolist() == [1.5]


# ---------------------------------------------------------------------------------------------------------------------
# torch 2.13.0: EmbeddingBag(6, 2, mode="mean", sparse=True), SparseAdam(lr=0.1), and
# loss = ((bag(ids) @ [1, -2] - [0.3, -0.7]) ** 2).mean()

HEAD, Y = np.array([1.0, -2.0], np.float32), np.array([0.3, -0.7], np.float32)
IDS = np.array([[[0, 1], [1, 3]], [[3, 3], [4, 0]], [[1, 4], [0, 0]], [[4, 1], [2, 1]]])
NAMES = ["weight"]
GROUPS = [{"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-08, "maximize": False, "params": [0]}]

# of arange(12).reshape(6, 2) / 10 - 0.5, after three steps on IDS[0], IDS[1], IDS[2], and after one more on IDS[3]
TORCH = {
    "weight": """-0.541594386 -0.358405888 -0.378147006 -0.121852972 -0.100000001 0.0
                 0.0494190715 0.250580996 0.230764419 0.469235659 0.5 0.600000024""",
    "exp_avg": """0.140226811 -0.280453622 -0.0155810229 0.0311620459 0.0 0.0
                  -0.0629999787 0.125999957 -0.00433104485 0.00866208971 0.0 0.0""",
    "exp_avg_sq": """0.00136459735 0.00545838941 0.000207453908 0.000829815632 0.0 0.0
                     0.000899909646 0.00359963859 0.000285500573 0.00114200229 0.0 0.0""",
}
TORCH_WENT_ON = """-0.541594386 -0.358405888 -0.351722717 -0.148277268 -0.158112764 0.0581128076
                   0.0494190715 0.250580996 0.266795456 0.433204621 0.5 0.600000024"""
# of arange(12).reshape(6, 2) / 10 - 0.25: three of our steps on IDS[3], IDS[2], IDS[1], given to torch, and what its
# step on IDS[0] made of it
OURS = {
    "weight": """-0.39998579 -1.42220324e-05 0.149079025 -0.14907904 0.0500006787 0.349999338
                 0.413881123 0.386118859 0.775749803 0.424250215 0.75 0.850000024""",
    "exp_avg": """0.0941000953 -0.188200191 -0.0360000953 0.0720001906 0.022499999 -0.0449999981
                  -0.0850000009 0.170000002 -0.0240249932 0.0480499864 0.0 0.0""",
    "exp_avg_sq": """0.000632693991 0.00253077596 7.31029286e-05 0.000292411714 5.06249999e-05 0.000202499999
                     0.00072250003 0.00289000012 0.000261675188 0.00104670075 0.0 0.0""",
}
TORCH_WENT_ON_FROM_OURS = """-0.451025099 0.0510251038 0.163702533 -0.163702562 0.0500006787 0.349999338
                             0.438489884 0.361510098 0.775749803 0.424250215 0.75 0.850000024"""
ADAM = optax.adam(0.1)


def table_of(text):
    return np.array(text.split(), np.float32).reshape(6, 2)


def loss_fn(params, ids):
    return jnp.mean((js.embedding_bag(params["weight"], ids, combiner="mean") @ HEAD - Y) ** 2)


@js.jit
def torchs_step(params, opt_state, ids):
    updates, opt_state = ADAM.update(jax.grad(loss_fn)(params, ids), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def test_from_torch():
    slots = {"step": 3} | {k: table_of(TORCH[k]) for k in ("exp_avg", "exp_avg_sq")}
    given = {"weight": table_of(TORCH["weight"])}, {"state": {0: slots}, "param_groups": GROUPS}
    params, opt_state = recipe("from_torch")(*given, NAMES)
    assert jax.tree.structure(opt_state) == jax.tree.structure(ADAM.init(params))
    (params, _) = torchs_step(params, opt_state, IDS[3])
    np.testing.assert_allclose(params["weight"], table_of(TORCH_WENT_ON), rtol=2e-6, atol=1e-6)


def test_to_torch_and_back_to_plain_optax():
    params = {"weight": jnp.arange(12, dtype=jnp.float32).reshape(6, 2) / 10 - 0.25}
    opt_state = ADAM.init(params)
    for ids in IDS[:0:-1]:
        params, opt_state = torchs_step(params, opt_state, ids)
    before = {"state": {}, "param_groups": GROUPS}
    weights, slots = recipe("to_torch")(params, opt_state, before, NAMES, lambda x: x)
    assert slots["param_groups"] is GROUPS and set(slots["state"]) == {0} and slots["state"][0]["step"] == 3
    given = {"weight": weights["weight"]} | {k: slots["state"][0][k] for k in ("exp_avg", "exp_avg_sq")}
    for k, x in given.items():
        assert type(x) is np.ndarray and x.flags.writeable  # torch.from_numpy warns of others
        small = 1e-7 if k == "weight" else 1e-9  # a parameter near 0 is what is left of larger numbers
        np.testing.assert_allclose(x, table_of(OURS[k]), rtol=2e-6, atol=small, err_msg=k)
    went_on, _ = torchs_step(jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, opt_state), IDS[0])
    np.testing.assert_allclose(went_on["weight"], table_of(TORCH_WENT_ON_FROM_OURS), rtol=2e-6, atol=1e-6)
    updates, _ = ADAM.update(jax.grad(loss_fn)(params, IDS[0]), opt_state, params)  # dense: all rows move
    dense, read = optax.apply_updates(params, updates)["weight"], np.isin(np.arange(6), IDS[0])
    np.testing.assert_allclose(dense[read], went_on["weight"][read], rtol=2e-6)
    assert (np.asarray(dense)[[2, 4]] != np.asarray(went_on["weight"])[[2, 4]]).all()  # read before
