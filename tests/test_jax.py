"""The room that JAX's internals are seen through: what is missing is said, what cannot be opened too."""

import ast
import importlib.util
import pathlib
import re
import sys
import warnings

import jax
import jax.core
import jax.extend.core.primitives
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxsparse as js
from jaxsparse import _jax
from jaxsparse.ops.row_sparse import is_row_sparse

V, D = 11, 4
TABLE = jnp.asarray(np.random.default_rng(0).normal(size=(V, D)), jnp.float32)
IDS = jnp.array([[3, 1, 3], [0, 10, 7]])
SAYS = rf"jax {re.escape(jax.__version__)} \(it was tested with 0\.10\.2, 0\.11\.2 and 0\.12\.0\): "


def test_no_other_room_knows_jax_from_inside():
    """Neither by its imports, nor by the fields of a jaxpr."""
    fields = {"eqns", "invars", "outvars", "constvars", "aval", "source_info", "debug_info", "in_avals", "jaxpr", "vma"}
    for path in pathlib.Path(_jax.__file__).parent.glob("*.py"):
        if path.stem == "_jax":
            continue
        tree = ast.parse(path.read_text())
        modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        modules |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
        inside = [m for m in modules if m and re.match(r"jax\.(_src|core|extend|interpreters|ad_util|lib)\b", m)]
        attributes = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert (inside, attributes & fields, calls & {"id"}) == ([], set(), set()), path.name


def import_again(monkeypatch):
    spec = importlib.util.spec_from_file_location("_jax_again", _jax.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "_jax_again", again)
    spec.loader.exec_module(again)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (jax.core, "eval_jaxpr"),
        (jax.extend.core, "jaxprs_in_params"),
        (jax.extend.random, "define_prng_impl"),
        (jax.extend.core.primitives, "scan_p"),
        (jax.extend.core.primitives, "gather_p"),
    ],
)
def test_what_is_missing_is_said_at_import(module, name, monkeypatch):
    import_again(monkeypatch)
    monkeypatch.delattr(module, name)
    with pytest.raises(ImportError, match=f"{SAYS}.*{name}"):
        import_again(monkeypatch)


def test_what_is_missing_is_said_at_first_use():
    scan = lambda t: jax.lax.scan(lambda c, i: (c + jnp.sum(t[i]), None), 0.0, IDS)[0]  # noqa: E731
    program = _jax.trace(scan, TABLE)
    (eqn,) = (e for e in program.equations if e.primitive is _jax.SCAN)
    assert _jax.scan_of(eqn)[1:4] == (1, 1, 2)
    with pytest.raises(RuntimeError, match=f"{SAYS}scan equations have no 'length'"):
        _jax.scan_of(eqn._replace(params={k: v for k, v in eqn.params.items() if k != "length"}))

    class OtherJaxpr:
        constvars = invars = outvars = ()

    with pytest.raises(RuntimeError, match=f"{SAYS}OtherJaxpr has no 'eqns'"):
        _jax._program(OtherJaxpr())
    with pytest.raises(RuntimeError, match=f"{SAYS}.*'source_info'"):
        _jax.source_frames(eqn._replace(jaxpr_eqn=object()))


# ---------------------------------------------------------------------------------------------------------------------
# regions


def in_shard_map(t):
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
    return jax.shard_map(lambda t: jnp.sum(t[IDS] ** 2), mesh=mesh, in_specs=P(), out_specs=P())(t)


def test_a_region_that_cannot_be_opened_is_said(monkeypatch):
    monkeypatch.setattr(sys.modules["jaxsparse.train.grad"], "_WARNED", set())
    with pytest.warns(
        UserWarning, match=r"the parameter is dense: shard_map at .*test_jax\.py:\d+ .*cannot open"
    ) as got:
        value, grads = js.value_and_grad(in_shard_map)(TABLE)
    assert got[0].filename == __file__
    assert len(got) == 1 and jax.__version__ in str(got[0].message)
    assert not is_row_sparse(grads)
    np.testing.assert_allclose(value, jnp.sum(TABLE[IDS] ** 2), rtol=1e-6)
    np.testing.assert_allclose(grads, jax.grad(lambda t: jnp.sum(t[IDS] ** 2))(TABLE), rtol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = js.explain(in_shard_map)(TABLE)[""]  # once a line
    assert said.cause == "shard_map" and "test_jax.py" in said.source and "read the rows outside of it" in said.advice


def test_a_region_that_uses_the_table_as_a_whole_is_no_news(monkeypatch):
    """Opening it would not help; and rules of the user's own are no obstacle of ours."""
    monkeypatch.setattr(sys.modules["jaxsparse.train.grad"], "_WARNED", set())

    def whole(t):
        mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
        return jax.shard_map(lambda t: jnp.sum(t**2), mesh=mesh, in_specs=P(), out_specs=P())(t)

    @jax.custom_jvp
    def own_rule(t):
        return jnp.sum(t[IDS] ** 2)

    own_rule.defjvp(lambda primals, tangents: (own_rule(*primals), jnp.sum(tangents[0])))
    for loss, cause in ((whole, "shard_map"), (own_rule, "its gradient is not zero in rows that are not read")):
        said = js.explain(loss)(TABLE)[""]
        assert (said.cause, said.advice) == (cause, "")
    assert js.explain(lambda t: jax.lax.cond(t[0, 0] > 0, jnp.sum, jnp.max, t))(TABLE)[""].advice == ""


def assert_opened(loss):
    value, grads = jax.jit(js.value_and_grad(loss))(TABLE)
    want = jax.value_and_grad(loss)(TABLE)
    assert is_row_sparse(grads)
    np.testing.assert_allclose(value, want[0], rtol=1e-6)
    np.testing.assert_allclose(grads.todense(), want[1], rtol=1e-5, atol=1e-6)


def test_remat_keeps_its_settings():
    policy = jax.checkpoint_policies.dots_saveable
    remat = jax.checkpoint(lambda t, i: jnp.sum(jnp.sin(t[i]) ** 2), policy=policy, prevent_cse=False)
    assert_opened(lambda t: remat(t, IDS))
    (eqn,) = (e for e in _jax.trace(lambda t: remat(t, IDS), TABLE).equations if _jax.is_remat(e))
    assert _jax.remat_of(eqn).wrap.keywords == {"policy": policy, "prevent_cse": False}


@pytest.mark.skipif(not hasattr(jax.config, "jax_remat3"), reason="this jax knows one prevent_cse for all arguments")
def test_remat_with_a_setting_for_each_argument():
    assert_opened(lambda t: jax.checkpoint(lambda t, i: jnp.sum(t[i] ** 2), prevent_cse=(True, False))(t, IDS))


@pytest.mark.skipif(not hasattr(jax.config, "jax_remat3"), reason="this jax has no new remat")
def test_the_new_remat_is_opened():
    jax.config.update("jax_remat3", True)
    try:
        assert_opened(lambda t: jax.checkpoint(lambda t, i: jnp.sum(jnp.sin(t[i]) ** 2))(t, IDS))
    finally:
        jax.config.update("jax_remat3", False)
