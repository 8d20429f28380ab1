"""flax.nnx: five models under nnx.jit and js.nnx.jit, what nnx promises besides, and gradients with nnx's contract."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import jaxsparse as js
from jaxsparse.ops.row_sparse import is_row_sparse
from tests.hlo import compiled_by_default, large_arrays
from tests.marks import slow_but
from tests.modules import MODELS, SkipGram, draw_ids, normal

V, D, B = 3000, 4, 6
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def setting():
    """Flax's layers promote ranks; and each test draws the same whatever ran before."""
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state
    with jax.numpy_rank_promotion("allow"):
        yield


def draw(*shape):
    return draw_ids(RNG, V, *shape)


def rngs():
    return nnx.Rngs(0, negatives=1)


def train_step(model, optimizer, metrics, batch):
    """As Flax's documentation writes it."""

    def loss_fn(model, batch):
        return model.loss(batch)

    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    metrics.update(loss=loss)
    optimizer.update(model, grads)
    return loss


def start(kind, tx):
    model = kind(V, D, rngs())
    metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"), spread=nnx.metrics.Welford("loss"))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param), metrics


def two_steps(sgd, adam, batch):
    """Of two optimizers, in one program."""
    return train_step(*sgd, batch), train_step(*adam, batch)


def numbers(*objects):
    """NumPy arrays of all leaves, by path."""
    leaves = jax.tree_util.tree_leaves_with_path([nnx.state(x) for x in objects])
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return {jax.tree_util.keystr(path): np.array(jax.random.key_data(x) if is_key(x) else x) for path, x in leaves}


def put_back(before, touched, objects):
    """Into all that has a row for each of a table's, the rows that no id names as they were."""
    states = [nnx.state(x) for x in objects]

    def one(path, x):
        path = jax.tree_util.keystr(path)
        name = next((name for name in touched if name in path), None)
        if name is None or x.ndim == 0:
            return x
        named = np.isin(np.arange(len(x)), touched[name])[:, None]
        return jnp.where(named, x, before[path])

    for x, new in zip(objects, jax.tree_util.tree_map_with_path(one, states), strict=True):
        nnx.update(x, new)


def assert_equal(got, want, tol=2e-5):
    assert got.keys() == want.keys()
    for path, x in want.items():
        close = {"rtol": tol, "atol": tol} if x.dtype.kind == "f" else {"rtol": 0}
        np.testing.assert_allclose(got[path].astype(float), x.astype(float), err_msg=path, **close)


@pytest.mark.cpu("a GPU adds up in another order each time")
@pytest.mark.parametrize("name", slow_but(["TwoTowers"], MODELS))
def test_five_models(name):
    """With SGD as nnx.jit; with Adam as nnx.jit with the rows put back that no id names. So are rngs, statistics and
    metrics."""
    kind = MODELS[name]
    txs = optax.sgd(0.3), optax.adam(0.1)
    ours, dense = [start(kind, tx) for tx in txs], [start(kind, tx) for tx in txs]
    our_step, dense_step = js.nnx.jit(two_steps), nnx.jit(two_steps)
    for _ in range(3):
        batch = kind.draw_batch(RNG, V, B)
        touched = kind.touched(batch)
        if kind is SkipGram:
            drawn = dense[1][0].negatives(nnx.clone(dense[1][0].rngs), B)
            touched["contexts"] = np.append(touched["contexts"], drawn)
        before = numbers(*dense[1][:2])
        got, want = our_step(*ours, batch), dense_step(*dense, batch)
        put_back(before, touched, dense[1][:2])
        np.testing.assert_allclose(got, want, rtol=1e-5)
        for our, other in zip(ours, dense, strict=True):
            assert_equal(numbers(*our), numbers(*other))
    left = np.setdiff1d(np.arange(V), np.concatenate([np.ravel(x) for x in touched.values()]))
    after = numbers(*ours[1][:2])
    tables = [path for path, x in after.items() if "mu" not in path and x.shape[:1] == (V,)]
    assert tables and all((after[path][left] == before[path][left]).all() for path in before if path in tables)
    assert our_step._cache_size() <= 3  # block sizes
    assert ours[0][2].compute()["spread"].mean == dense[0][2].compute()["spread"].mean


@pytest.mark.parametrize("name", slow_but(["Factors"], MODELS))
def test_no_table_is_copied(name):
    kind = MODELS[name]
    objects, batch = start(kind, optax.adam(0.1)), kind.draw_batch(RNG, V, B)
    before = numbers(*objects)

    def made(step):
        return large_arrays(compiled_by_default(step.lower(*objects, batch)).as_text(), V // 16 * D)

    assert not made(js.nnx.jit(train_step))
    assert made(nnx.jit(train_step))
    assert_equal(numbers(*objects), before, tol=0)
    abstract = nnx.eval_shape(lambda: start(kind, optax.adam(0.1)))
    assert js.nnx.jit(train_step).lower(*abstract, batch).as_text()


# ---------------------------------------------------------------------------------------------------------------------
# What nnx promises besides, on a small model


class Small(nnx.Module):
    """A table that is read under two names, statistics, rngs, and what it counts and sows."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.again = nnx.List([self.embed])
        self.norm, self.dropout = nnx.BatchNorm(D, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)
        self.head, self.calls = nnx.Linear(D, 1, rngs=rngs), nnx.Variable(jnp.int32(0))
        self.mode = "new"

    def __call__(self, ids):
        self.calls[...] += 1
        h = self.dropout(self.norm(self.embed(ids).sum(1) + self.again[0](ids[:, 0])))
        return self.head(h)[:, 0]

    def loss(self, batch):
        return jnp.mean((self(batch[0]) - batch[1]) ** 2)

    @staticmethod
    def draw_batch():
        return draw(B, 3), normal(RNG, B)


def loss_of(model, batch):
    return model.loss(batch)


def sgd_step(model, optimizer, batch):
    loss, grads = nnx.value_and_grad(loss_of)(model, batch)
    optimizer.update(model, grads)
    return loss


def pair(make):
    """For nnx.jit and for js.nnx.jit."""
    return [(nnx.jit, make()), (js.nnx.jit, make())]


SGD = optax.sgd(0.3)


def with_optimizer(wrt=nnx.Param, tx=SGD):
    model = Small(rngs())
    return model, nnx.Optimizer(model, tx, wrt=wrt)


def assert_same(run, make=with_optimizer, steps=3):
    """run(jit, objects) returns a function of a batch, which is to do and return the same with both words."""
    (_, dense), (_, ours) = both = pair(make)
    functions = [run(jit, objects) for jit, objects in both]
    for _ in range(steps):
        batch = Small.draw_batch()
        want, got = (f(batch) for f in functions)
        assert_equal(numbers(*ours), numbers(*dense))
        assert_equal(leaf_numbers(got), leaf_numbers(want))
    return ours


def leaf_numbers(tree):
    return {str(n): np.asarray(x) for n, x in enumerate(jax.tree.leaves(tree))}


@pytest.mark.slow
def test_ways_of_calling():
    """Keywords, static arguments, a decorator with options, a method, and cached_partial."""

    def scaled(model, optimizer, batch, *, scale):
        loss, grads = nnx.value_and_grad(lambda model: scale["by"] * model.loss(batch))(model)
        optimizer.update(model, grads)
        return {"loss": loss, "scale": jnp.float32(scale["by"])}

    class Scale(dict):
        __hash__ = lambda self: 1  # noqa: E731

    def by_number(jit, objects):
        step = jit(lambda scale, *objects: scaled(*objects, scale={"by": scale}), static_argnums=0)
        return lambda batch: step(3, *objects, batch)

    assert_same(by_number, steps=1)

    def with_options(jit, objects):
        step = jit(static_argnames="scale", donate_argnames=("model", "optimizer"), graph=True, graph_updates=True)(
            scaled
        )
        return lambda batch: functools.partial(step, *objects)(batch=batch, scale=Scale(by=1.0))

    assert_same(with_options, steps=1)


@pytest.mark.slow
def test_cached_partial():
    ours = assert_same(lambda jit, objects: nnx.cached_partial(jit(sgd_step), *objects))
    assert ours[0].calls[...] == 3


def test_a_method():
    def run(jit, objects):
        class Trained(Small):
            @jit
            def step(self, optimizer, batch):
                return sgd_step(self, optimizer, batch)

        model = Trained(rngs())
        nnx.update(model, nnx.state(objects[0]))
        objects[0] = model
        return lambda batch: model.step(objects[1], batch)

    assert_same(run, lambda: list(with_optimizer()), steps=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_the_graph_may_change():
    """What is sown, new attributes, plain ones, and a module that is returned."""

    class Sowing(Small):
        def loss(self, batch):
            loss = super().loss(batch)
            self.sow(nnx.Intermediate, "losses", loss)
            self.last = nnx.Variable(loss)
            return loss

    def make():
        model = Sowing(rngs())
        return model, nnx.Optimizer(model, optax.sgd(0.3), wrt=nnx.Param)

    def step(model, optimizer, batch):
        if model.mode == "new":
            model.history, model.mode = nnx.Variable(jnp.zeros(2)), "old"
        else:
            model.history[...] += 1
        return sgd_step(model, optimizer, batch), model.head

    def run(jit, objects):
        step_of_word = jit(step)

        def call(batch):
            loss, head = step_of_word(*objects, batch)
            assert head is objects[0].head
            return loss, head(jnp.ones((1, D)))

        return call

    ours = assert_same(run, make, steps=2)
    assert ours[0].mode == "old" and ours[0].history[...].tolist() == [1.0, 1.0]
    assert len(nnx.pop(ours[0], nnx.Intermediate)["losses"].get_value()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("wrt", [nnx.PathContains("again"), nnx.All(nnx.Param, nnx.PathContains("head"))])
def test_filters(wrt):
    def step(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, wrt))(model, batch)
        optimizer.update(model, grads)
        return loss

    def run(jit, objects):
        step_of_word = jit(step)
        return lambda batch: step_of_word(*objects, batch)

    no_table = pytest.warns(UserWarning, match="no array of the state is read by rows")
    with no_table if isinstance(wrt, nnx.All) else contextlib.nullcontext():
        assert_same(run, lambda: with_optimizer(wrt), steps=2)


@pytest.mark.slow
def test_model_and_optimizer():
    def step(state, batch):
        loss, grads = nnx.value_and_grad(loss_of)(state.model, batch)
        state.update(grads)
        return loss

    def run(jit, objects):
        step_of_word = jit(step)
        return lambda batch: step_of_word(*objects, batch)

    assert_same(run, lambda: [nnx.ModelAndOptimizer(Small(rngs()), optax.sgd(0.3))], steps=2)


def test_it_compiles_anew_when_the_graph_changes_and_not_before():
    traced, step = [], js.nnx.jit(lambda *args: traced.append(1) or sgd_step(*args))
    model, optimizer = with_optimizer()
    batch = Small.draw_batch()
    sizes = []
    for change in (None, None, model.eval, None, model.train):
        if change:
            change()
        step(model, optimizer, batch)
        sizes.append((step._cache_size(), len(traced)))
    assert sizes == [(1, 2), (1, 2), (2, 4), (2, 4), (2, 4)]  # traced once to see what it changes


def test_evaluation_leaves_the_model_alone():
    """And is silent: nothing that it changes has rows."""
    model, _ = with_optimizer()
    model.eval()
    held = model.embed.embedding[...]

    @js.nnx.jit
    def evaluate(model, metrics, batch):
        metrics.update(values=model.loss(batch))

    @js.nnx.jit
    def predict(model, ids):
        return model(ids)

    model.calls = nnx.Variable(jnp.int32(0))  # which a call changes
    metrics, batch = nnx.MultiMetric(loss=nnx.metrics.Average()), Small.draw_batch()
    for _ in range(2):
        evaluate(model, metrics, batch)
    np.testing.assert_allclose(metrics.compute()["loss"], model.loss(batch), rtol=1e-5)
    np.testing.assert_allclose(predict(model, batch[0]), model(batch[0]), rtol=1e-5)
    assert model.calls[...] == 5 and model.embed.embedding[...] is held and not held.is_deleted()


def test_what_is_changed_is_donated_and_nothing_else():
    model, optimizer = with_optimizer()
    model.eval()
    frozen, batch = nnx.clone(model), Small.draw_batch()  # which shares the arrays

    def step(model, frozen, optimizer, batch):
        target = frozen(batch[0])
        loss, grads = nnx.value_and_grad(lambda m: m.loss((batch[0], target)))(model)
        optimizer.update(model, grads)
        return loss

    step = js.nnx.jit(step)
    assert step(model, frozen, optimizer, batch) == 0
    held = [model.embed.embedding[...], frozen.embed.embedding[...], model.norm.mean[...]]
    step(model, frozen, optimizer, batch)
    assert [x.is_deleted() for x in held] == [True, False, False]


def test_arrays_that_are_gone_are_named():
    model, optimizer = with_optimizer()
    other, batch = nnx.clone(model), Small.draw_batch()
    step = js.nnx.jit(sgd_step)
    step(model, optimizer, batch)
    got = r"Got an array that is gone at \['model'\]\['again'\]\[0\].*nnx\.clone and nnx\.state share.*jnp\.copy"
    with pytest.raises(RuntimeError, match=got):
        step(other, optimizer, batch)
    copied = jax.tree.map(jnp.copy, nnx.state(model))
    step(model, optimizer, batch)
    nnx.update(other, copied)
    step(other, optimizer, batch)


@pytest.mark.slow
def test_rows_that_are_trained():
    model, optimizer = with_optimizer()
    ids, y = Small.draw_batch()
    before, chosen = np.array(model.embed.embedding[...]), np.unique(ids)[::2]
    js.nnx.jit(sgd_step, rows={"embedding": chosen})(model, optimizer, (ids, y))
    changed = np.flatnonzero((model.embed.embedding[...] != before).any(1))
    assert changed.tolist() == chosen.tolist()


@pytest.mark.slow
def test_replay_of_batches_that_know_their_ids():
    """An Adam that equals the dense one in all rows, which js.jit finds in the optimizer's variables."""
    batches = js.batches(draw(12, 3), normal(RNG, 12), batch_size=6)
    (model, optimizer), (dense, dense_optimizer) = (
        with_optimizer(tx=js.lazy_adam(0.1, untouched="replay")),
        with_optimizer(tx=optax.adam(0.1)),
    )
    replaying = js.nnx.jit(lambda model, optimizer, batch: sgd_step(model, optimizer, (batch.x, batch.y)))
    stock = nnx.jit(sgd_step)
    for _ in range(2):
        for batch in batches:
            replaying(model, optimizer, batch)
            stock(dense, dense_optimizer, (batch.x, batch.y))
    state = {"params": nnx.as_pure(nnx.state(model, nnx.Param)), "opt_state": nnx.as_pure(optimizer.opt_state)}
    nnx.update(model, js.flush(state)["params"])
    assert_equal(numbers(model), numbers(dense))


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_but([AxisType.Explicit], [AxisType.Auto, AxisType.Explicit]))
def test_partitioned_variables(kind):
    """A table whose rows are split over two devices, by its metadata: it stays so, and the step is that of one device.
    On an Explicit mesh jax.jit wants to be told the sharding of the rows that are read, js.jit does not."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))

    class Partitioned(nnx.Module):
        def __init__(self, rngs, axis):
            init = nnx.with_partitioning(nnx.initializers.normal(), (axis, None))
            self.embed = nnx.Embed(V, D, embedding_init=init, rngs=rngs)
            self.head = nnx.Linear(D, 1, use_bias=False, rngs=rngs)

        def loss(self, batch):
            return jnp.mean((self.head(self.embed(batch[0]).sum(1))[:, 0] - batch[1]) ** 2)

    def make(axis):
        with jax.set_mesh(mesh):
            model = Partitioned(rngs(), axis)
            return model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)

    ours, dense, batch = make("x"), make(None), Small.draw_batch()
    spread = jax.device_put(batch, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    one = jax.tree.map(np.asarray, nnx.state(dense))
    nnx.update(dense, one)  # on no mesh
    for _ in range(2):
        np.testing.assert_allclose(js.nnx.jit(sgd_step)(*ours, spread), nnx.jit(sgd_step)(*dense, batch), rtol=1e-5)
    assert_equal(numbers(*ours), numbers(*dense))
    for table in (ours[0].embed.embedding, ours[1].opt_state[0].mu["embed"]["embedding"]):
        assert table.get_value().sharding.spec[0] == "x"


def test_explain_a_step():
    model, optimizer = with_optimizer(tx=optax.adam(0.1))
    said = js.nnx.explain(js.nnx.jit(sgd_step))(model, optimizer, Small.draw_batch())
    assert said["['model']['again'][0]['embedding']"].rows_read == 4 * B
    slot = said["['optimizer']['opt_state'][0]['mu']['again'][0]['embedding']"]
    assert slot.row_sparse and slot.cause == "by the rows of ['model']['again'][0]['embedding']"
    assert not said["['model']['norm']['mean']"].row_sparse and "['model']['mode']" not in said.parameters
    assert model.calls[...] == 0


def test_what_js_nnx_jit_refuses():
    model, _ = with_optimizer()
    batch = Small.draw_batch()
    with pytest.raises(ValueError, match=r"Write Small\.loss and pass the module as its first argument"):
        js.nnx.jit(model.loss)
    with pytest.raises(ValueError, match=r"(?s)'step' .* Write Small\.loss and pass the module as its first argument"):
        js.nnx.jit(functools.partial(model.loss, batch))
    with pytest.raises(TypeError, match=r"'in_shardings' argument of js\.nnx\.jit must be left out"):
        js.nnx.jit(sgd_step, in_shardings=None)
    with pytest.raises(TypeError, match=r"called with arrays and numbers.*Got a str at argument \[2\].*static_argnums"):
        js.nnx.jit(sgd_step)(model, model, "batch")
    with pytest.raises(ValueError, match="looks across rows"):
        js.nnx.jit(sgd_step)(model, nnx.Optimizer(model, optax.lamb(0.1), wrt=nnx.Param), batch)
    assert model.calls[...] == 0  # the module is as it was


class PlainAverage(nnx.Module):
    """An average of all parameters, in arrays that no variable holds."""

    def __init__(self, model):
        self.average = nnx.data(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def test_an_average_in_plain_arrays_is_named():
    def step(model, optimizer, held, batch):
        loss = sgd_step(model, optimizer, batch)
        now = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        held.average = nnx.data(jax.tree.map(lambda a, x: 0.9 * a + 0.1 * x, held.average, now))
        return loss

    model, optimizer = with_optimizer()
    held = PlainAverage(model)
    with pytest.raises(ValueError, match=r"\['held'\]\['average'\].* hold each in an nnx\.Variable"):
        js.nnx.jit(step)(model, optimizer, held, Small.draw_batch())


# ---------------------------------------------------------------------------------------------------------------------
# Steps of Flax's documentation and examples


class InRemat(Small):
    """The table is read under nnx.remat."""

    @nnx.remat
    def encode(self, ids):
        return self.norm(self.embed(ids).sum(1))

    def __call__(self, ids):
        return self.head(self.encode(ids))[:, 0]


class InCond(Small):
    """One branch reads all ids of an example, the other one its first."""

    def __call__(self, ids):
        whole = lambda model, ids: model.embed(ids).sum(1)  # noqa: E731
        first = lambda model, ids: model.embed(ids[:, 0])  # noqa: E731
        return self.head(nnx.cond(ids[0, 0] % 2 == 0, whole, first, self, ids))[:, 0]


class Layers(Small):
    """Blocks with rngs of their own, under nnx.remat in an nnx.scan."""

    def __init__(self, rngs):
        super().__init__(rngs)

        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def towers(rngs):
            return nnx.Dropout(0.2, rngs=rngs), nnx.Linear(D, D, rngs=rngs)

        self.towers = nnx.List(towers(rngs))

    def __call__(self, ids):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def through(layer, x):
            dropout, dense = layer
            return x + dropout(dense(x))

        return self.head(through(tuple(self.towers), self.embed(ids).sum(1)))[:, 0]


def averaged_step(model, optimizer, average, batch):
    loss = sgd_step(model, optimizer, batch)
    average.update(model)
    return loss


def two_optimizers_step(model, first, second, batch):
    loss, grads = nnx.value_and_grad(loss_of)(model, batch)
    first.update(model, nnx.filter_state(grads, nnx.PathContains("again")))
    second.update(model, nnx.filter_state(grads, nnx.Not(nnx.PathContains("again"))))
    return loss


def accumulating_step(model, optimizer, batch):
    """Gradients of two halves of a batch, by nnx.split and nnx.merge in a scan."""
    graph, params, others = nnx.split(model, nnx.Param, ...)

    def add(total, half):
        loss = lambda params: nnx.merge(graph, params, others, copy=True).loss(half)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(jnp.add, total, grads), value

    halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)
    grads, losses = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), halves)
    optimizer.update(model, grads)
    return losses


def model_and_optimizer(tx, kind=Small):
    model = kind(rngs())
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def with_average(tx):
    model, optimizer = model_and_optimizer(tx)
    return model, optimizer, nnx.EMA(model, decay=0.9, only=nnx.Param)


def two_optimizers(tx):
    model, where = Small(rngs()), nnx.PathContains("again")
    return model, nnx.Optimizer(model, tx, wrt=where), nnx.Optimizer(model, SGD, wrt=nnx.All(nnx.Param, nnx.Not(where)))


DOCUMENTED = {
    "remat": (sgd_step, functools.partial(model_and_optimizer, kind=InRemat)),
    "cond": (sgd_step, functools.partial(model_and_optimizer, kind=InCond)),
    "scan of remat": (sgd_step, functools.partial(model_and_optimizer, kind=Layers)),
    "average": (averaged_step, with_average),
    "two optimizers": (two_optimizers_step, two_optimizers),
    "accumulated": (accumulating_step, model_and_optimizer),
}


@pytest.mark.cpu("a GPU adds up in another order each time")
@pytest.mark.parametrize("name", slow_but(["cond"], DOCUMENTED))
def test_documented_steps(name):
    """As nnx.jit, with Adam after one step: rows that are not read have no moments yet. The table is row-sparse."""
    step, make = DOCUMENTED[name]
    ours, dense, batch = make(optax.adam(0.1)), make(optax.adam(0.1)), Small.draw_batch()
    our_step = js.nnx.jit(step)
    said = js.nnx.explain(our_step)(*ours, batch).parameters
    tables = [x for path, x in said.items() if x.num_rows == V]
    assert len(tables) >= 3 and all(x.row_sparse for x in tables)
    got, want = our_step(*ours, batch), nnx.jit(step)(*dense, batch)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert_equal(numbers(*ours), numbers(*dense), tol=1e-4)


@pytest.mark.slow
def test_split_and_merge_by_hand():
    """js.jit of a pure step whose state is an nnx.State."""

    def run(jit):
        graph, state = nnx.split(model_and_optimizer(SGD))

        def step(state, batch):
            model, optimizer = nnx.merge(graph, state, copy=True)
            loss = sgd_step(model, optimizer, batch)
            return nnx.state((model, optimizer)), loss

        step, losses = jit(step), []
        for batch in batches:
            state, loss = step(state, batch)
            losses.append(loss)
        return numbers(nnx.merge(graph, state)), losses

    batches = [Small.draw_batch() for _ in range(3)]
    (got, losses), (want, want_losses) = run(js.jit), run(jax.jit)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    assert_equal(got, want)


@pytest.mark.slow
def test_a_checkpoint_of_orbax(tmp_path):
    """What a step has updated is saved, restored into a new model, and trained on: as without the stop."""
    orbax = pytest.importorskip("orbax.checkpoint")
    objects, again = (model_and_optimizer(optax.adam(0.1)) for _ in range(2))
    first, second = (Small.draw_batch() for _ in range(2))
    step = js.nnx.jit(sgd_step)
    step(*objects, first)
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(objects))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", nnx.state(again))
    nnx.update(again, restored)
    np.testing.assert_allclose(step(*again, second), step(*objects, second), rtol=1e-6)
    assert_equal(numbers(*again), numbers(*objects), tol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


def densified(grads):
    return jax.tree.map(lambda g: g.todense() if is_row_sparse(g) else g, grads, is_leaf=is_row_sparse)


def two(first, second, batch):
    return first.loss(batch) + jnp.sum(second(batch[0]))


GRADIENTS = {
    "one": (lambda first, second, batch: first.loss(batch), {}),
    "two": (two, {"argnums": (0, 1)}),
    "in another order": (two, {"argnums": (1, nnx.DiffState(0, nnx.PathContains("head")))}),
    "of a filter": (two, {"argnums": nnx.DiffState(1, nnx.PathContains("again"))}),
    "with aux": (
        lambda first, second, batch: (two(first, second, batch), {"h": batch[1], "m": first}),
        {"has_aux": True},
    ),
    "of an array": (lambda model, scale, batch: model.loss(batch) * scale["by"], {"argnums": (0, 1)}),
}


@pytest.mark.parametrize("name", slow_but(["with aux"], GRADIENTS))
def test_gradients_have_the_contract_of_nnx(name):
    fun, options = GRADIENTS[name]
    batch = Small.draw_batch()
    results = []
    for word in (nnx, js.nnx):
        objects = Small(rngs()), {"by": jnp.float32(3)} if name == "of an array" else Small(nnx.Rngs(3))
        out = word.value_and_grad(fun, **options)(*objects, batch)
        again = word.grad(**options, graph=True)(fun)(*objects, batch)
        value, grads = out
        if "has_aux" in options:
            assert value[1].pop("m") is objects[0] and again[1].pop("m") is objects[0]
        if word is js.nnx:
            assert any(map(is_row_sparse, jax.tree.leaves(grads, is_leaf=is_row_sparse)))
        results.append((densified(value), densified(grads), densified(again), [nnx.state(x) for x in objects]))
    want, got = results
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert_equal(leaf_numbers(jax.tree.map(key_data, got)), leaf_numbers(jax.tree.map(key_data, want)))


def key_data(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_what_a_loss_changes_is_kept():
    """Statistics and counts of rngs are compared above; here what is sown and new."""

    def loss(model, ids):
        model.sow(nnx.Intermediate, "h", jnp.float32(3))
        model.seen = nnx.Variable(ids.sum())
        model.mode = "old"
        return jnp.sum(model(ids))

    model, ids = Small(rngs()), jnp.asarray(draw(B, 3))
    js.nnx.grad(loss)(model, ids)
    assert nnx.pop(model, nnx.Intermediate)["h"].get_value() == (3,)
    assert model.seen[...] == ids.sum() and model.mode == "old" and model.calls[...] == 1


@pytest.mark.slow
def test_two_words():
    """Under a donated nnx.jit no table is copied; under js.nnx.jit the step as a whole is row-sparse."""

    def step(model, optimizer, batch):
        loss, grads = js.nnx.value_and_grad(loss_of)(model, batch)
        optimizer.update(model, grads)
        return loss

    donated = nnx.jit(step, donate_argnums=(0, 1))
    (model, optimizer), (other, stock) = with_optimizer(tx=js.lazy(optax.adam(0.1))), with_optimizer(tx=optax.adam(0.1))
    batch = jax.tree.map(jnp.asarray, Small.draw_batch())
    text = compiled_by_default(donated.lower(model, optimizer, batch).lowered).as_text()
    assert not large_arrays(text, V)
    for word, m, o in ((donated, model, optimizer), (js.nnx.jit(step), other, stock)):
        for _ in range(2):
            word(m, o, batch)
    assert_equal(numbers(model), numbers(other))


def test_explain_a_loss():
    model = Small(rngs())
    said = js.nnx.explain(two, argnums=(0, nnx.DiffState(1, nnx.PathContains("head"))))(
        model, Small(rngs()), Small.draw_batch()
    )
    assert said["[0]['again'][0]['embedding']"].rows_read == 4 * B and not said["[1]['head']['kernel']"].row_sparse
    assert model.calls[...] == 0
    with pytest.raises(ValueError, match=r"\['head'\]\['kernel'\]"):
        js.nnx.explain(loss_of, tables="kernel")(model, Small.draw_batch())


def test_gradients_by_decorator_and_by_name():
    fun = lambda model, ids: jnp.sum(model(ids) ** 2)  # noqa: E731
    model, ids = nnx.Embed(6, 2, rngs=nnx.Rngs(0)), jnp.array([3, 0, 3])
    want, expected = nnx.value_and_grad(fun)(model, ids)
    for got, grads in [
        js.nnx.value_and_grad(argnums=0)(fun)(model, ids),
        js.nnx.value_and_grad(fun)(model, ids=ids),
    ]:
        np.testing.assert_allclose(got, want, rtol=1e-6)
        assert is_row_sparse(grads["embedding"].get_value())
        np.testing.assert_allclose(grads["embedding"].get_value().todense(), expected["embedding"][...], rtol=1e-6)


def test_the_gradient_of_a_variable():
    table, ids = nnx.Param(jnp.arange(12.0).reshape(6, 2)), jnp.array([3, 0, 3])
    fun = lambda table, ids: jnp.sum(table[...][ids] ** 2)  # noqa: E731
    ours, theirs = js.nnx.grad(fun)(table, ids), nnx.grad(fun)(table, ids)
    got, want = (jax.tree.leaves(x, is_leaf=is_row_sparse) for x in (ours, theirs))
    np.testing.assert_allclose(got[0].todense() if is_row_sparse(got[0]) else got[0], want[0], rtol=1e-6)


def test_what_gradients_refuse():
    model, batch = Small(rngs()), Small.draw_batch()
    with pytest.raises(ValueError, match=r"Write Small\.loss and pass the module"):
        js.nnx.grad(model.loss)
    with pytest.raises(TypeError, match=r"'holomorphic' argument of js\.nnx\.value_and_grad must be left out"):
        js.nnx.value_and_grad(loss_of, holomorphic=True)
    with pytest.raises(TypeError, match=r"'graph' argument of js\.nnx\.grad must be left out"):
        js.nnx.grad(loss_of, graph=False)
    with pytest.raises(ValueError, match=r"must be different positions\. Got 0 twice"):
        js.nnx.grad(loss_of, argnums=(0, nnx.DiffState(0, nnx.Param)))
    with pytest.raises(TypeError, match=r"must be positions among the 2 arguments\. Got 2 instead"):
        js.nnx.grad(loss_of, argnums=2)(model, batch)
    with pytest.raises(TypeError, match=r"returns \(scalar, aux\), as has_aux=True says"):
        js.nnx.grad(loss_of, has_aux=True)(model, batch)
    with pytest.raises(TypeError, match=r"returns a real scalar"):
        js.nnx.grad(lambda model, batch: model(batch[0]))(model, batch)
    with pytest.raises(TypeError, match=r"a leaf of dtype int32 at \['calls'\]"):
        js.nnx.grad(loss_of, argnums=nnx.DiffState(0, nnx.PathContains("calls")))(model, batch)
    with pytest.raises(ValueError, match="Inconsistent aliasing"):  # as in nnx
        js.nnx.grad(lambda model, other: model.loss(batch))(model, model)
    with pytest.raises(TypeError, match=r"\['only'\], which only go by name"):
        js.nnx.grad(lambda model, *, only: model.loss(only))(model, only=batch)
    assert model.calls[...] == 0
