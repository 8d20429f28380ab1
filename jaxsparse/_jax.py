"""The only module that uses parts of JAX without a promise of stability. All other modules call its functions.

If JAX lacks one of these parts, an error at import or at first use names the version found and the versions tested
(`TESTED`). The module uses:

* The result of jax.make_jaxpr: `eqns`, `invars`, `outvars`, `constvars`, `consts`, `effects`, `debug_info`, `replace`
  of a program, which since 0.11 holds its own constants; `primitive`, `params`, `invars`, `outvars`, `effects`,
  `source_info.traceback.frames` of an equation; `aval` of a variable, `val` of a jax.extend.core.Literal. Other modules
  see `Program` and `Equation` instead.
* jax.extend.core.primitives: an equation's primitive is one of these objects, and is compared by identity. The new
  remat (jax_remat3) has no object there: it is a `call_hi_primitive` with a `_prim` that has a `jaxpr`.
  Other such primitives have `expand` and `in_tree`.
* Parameters of equations: jit `jaxpr`, `name`; closed_call `call_jaxpr`; remat `jaxpr`, `policy`, `prevent_cse`; scan
  `jaxpr`, `length`, `reverse`, `unroll`, and `num_consts`, `num_carry` (until 0.10) or `ft_in` (since 0.11); cond
  `branches`; gather `dimension_numbers`, `slice_sizes`, `mode`, `fill_value`; dynamic_slice `slice_sizes`;
  convert_element_type `new_dtype`; reduce_sum `axes`; while `cond_jaxpr`, `body_jaxpr`, `cond_nconsts`,
  `body_nconsts`; psum, pmax, pmin and psum_invariant `axes`. For scatter, broadcast_in_dim, reshape, slice, pad,
  transpose, squeeze, rev, dot_general, concatenate, sort, split, stack, unstack and top_k, the arguments of the
  function in jax.lax. For any other equation, jax.extend.core.jaxprs_in_params gives the programs that it holds.
* Names of primitives that jax.extend.core.primitives does not list: psum_invariant, pvary, pcast, split, stack and
  unstack. `jaxsparse/export`, which writes equations in NumPy, knows primitives by their names and parameters, and
  refuses the others. custom_jvp_call and custom_vjp_call have a `call_jaxpr`.
* jax.core.eval_jaxpr evaluates a program; jax.interpreters.partial_eval.dce_jaxpr removes what is not needed of one.
  `get_bind_params` and `bind` of a primitive, in an equation's `ctx.manager`, evaluate an equation with other
  parameters; `replace` of an equation gives it another `source_info`.
* `effects` of a program; a NamedAxisEffect says that it uses a mapped axis. `weak_type` of an array's type.
* jax.extend.random.define_prng_impl makes a dtype that arithmetic refuses.
* jax.experimental.pallas and jax.experimental.pallas.tpu, which are public and may change: `pallas_call`, `BlockSpec`,
  `ANY`, `SMEM`, `SemaphoreType.DMA`, `make_async_copy`, `ds`, `when`. They are imported at first use.
* jax.core.Tracer, jax.extend.core.valid_jaxtype, and `manual_axis_type.varying` of jax.typeof with jax.lax.pcast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType

TESTED = ("0.10.2", "0.11.2", "0.12.0")


def _unknown(problem: object) -> str:
    versions = f"{', '.join(TESTED[:-1])} and {TESTED[-1]}"
    return f"jaxsparse cannot work with jax {jax.__version__} (it was tested with {versions}): {problem}"


@contextlib.contextmanager
def _looking_inside() -> Iterator[None]:
    """A context for code that reads fields of JAX's objects: a missing field is a RuntimeError."""
    try:
        yield
    except AttributeError as error:
        raise RuntimeError(_unknown(f"{type(error.obj).__name__} has no {error.name!r}")) from error


try:
    import jax.core
    import jax.extend.core
    import jax.extend.core.primitives
    from jax.core import Tracer, eval_jaxpr
    from jax.extend.core import Literal, jaxprs_in_params, valid_jaxtype
    from jax.extend.random import define_prng_impl
    from jax.interpreters.partial_eval import dce_jaxpr
    from jax.lax import pcast
except ImportError as error:
    raise ImportError(_unknown(error)) from error


def primitives(names: str) -> frozenset[Any]:
    """The primitives of these names, without the "_p" of jax.extend.core.primitives."""
    return frozenset(map(_primitive, names.split()))


def _primitive(name: str) -> Any:
    found = getattr(jax.extend.core.primitives, f"{name}_p", None)
    if found is None:
        raise ImportError(_unknown(f"jax.extend.core.primitives has no '{name}_p'"))
    return found


CALLS = primitives("jit closed_call")
BROADCAST = _primitive("broadcast_in_dim")
COND, CONCATENATE, CONVERT, DYNAMIC_SLICE, GATHER, REDUCE_SUM, SCAN, SCATTER_ADD, SELECT, SLICE, STOP_GRADIENT = map(
    _primitive,
    "cond concatenate convert_element_type dynamic_slice gather reduce_sum scan scatter_add select_n slice "
    "stop_gradient".split(),
)
_REMAT = _primitive("remat")
_WITH_DERIVATIVES = primitives("custom_jvp_call custom_vjp_call")
_NEW_REMAT = "RematTraced"


# ---------------------------------------------------------------------------------------------------------------------
# programs


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A traced function. Its variables are opaque keys; `shape` and `dtype` are functions of them."""

    constants: dict[Any, Any]  # {variable: array}
    inputs: Sequence[Any]  # variables
    outputs: Sequence[Any]  # variables and literals
    equations: Sequence[Equation]
    jaxpr: Any  # JAX's object, for this module


class Equation(NamedTuple):
    """One operation of a program."""

    primitive: Any
    params: dict[str, Any]
    inputs: Sequence[Any]  # variables and literals
    outputs: Sequence[Any]  # variables
    jaxpr_eqn: Any  # JAX's object, for this module

    @property
    def key(self) -> Any:
        """A key that is the same for each `Equation` of one equation of JAX's program."""
        return self.jaxpr_eqn

    def param(self, name: str) -> Any:
        """The parameter of this name. Raises RuntimeError if the equation has none."""
        if name not in self.params:
            raise RuntimeError(_unknown(f"{self.primitive} equations have no {name!r}"))
        return self.params[name]


def trace(fun: Callable[..., Any], *args: Any) -> Program:
    """The program of fun(*args), its inputs being the leaves of args."""
    return _program(jax.make_jaxpr(fun)(*args))


def _program(closed: Any) -> Program:
    """The Program of a jaxpr that has its constants or needs none."""
    return _program_with(getattr(closed, "jaxpr", closed), getattr(closed, "consts", ()))


def _program_with(jaxpr: Any, constants: Sequence[Any]) -> Program:
    with _looking_inside():
        equations = [Equation(e.primitive, e.params, e.invars, e.outvars, e) for e in jaxpr.eqns]
        named = dict(zip(jaxpr.constvars, constants, strict=True))
        return Program(named, jaxpr.invars, jaxpr.outvars, equations, jaxpr)


def shape(v: Any) -> tuple[int, ...]:
    return tuple(v.aval.shape)


def dtype(v: Any) -> Any:
    return v.aval.dtype


def is_literal(v: Any) -> bool:
    """Whether an operand or output is a number, not a variable."""
    return isinstance(v, Literal)


def literal_value(v: Any) -> Any:
    return v.val


def source_frames(eqn: Equation) -> list[tuple[str, int, str]]:
    """(file, line, function) of the calls that made an equation, the innermost first."""
    with _looking_inside():
        traceback = eqn.jaxpr_eqn.source_info.traceback
        return [(f.file_name, f.line_num, f.function_name) for f in traceback.frames] if traceback else []


# ---------------------------------------------------------------------------------------------------------------------
# equations that hold programs


def called(eqn: Equation) -> Program:
    """The program that an equation of `CALLS` calls."""
    return _program(eqn.params["call_jaxpr"] if "call_jaxpr" in eqn.params else eqn.param("jaxpr"))


def called_name(eqn: Equation) -> str | None:
    """The name of the called function; None if the equation is not a call."""
    return eqn.params.get("name") if eqn.primitive in CALLS else None


def branches(eqn: Equation) -> list[Program]:
    """The branches of a COND."""
    return [_program(branch) for branch in eqn.param("branches")]


def inlined(eqn: Equation) -> Program | None:
    """The program that an equation calls once, with its inputs unchanged: a call, a function with custom derivatives,
    or one under jax.checkpoint. None for other equations."""
    if is_remat(eqn):
        return remat_of(eqn).body
    if eqn.primitive in CALLS or eqn.primitive in _WITH_DERIVATIVES:
        return called(eqn)
    return None


def expanded(eqn: Equation) -> Program | None:
    """The equations that stand for a `call_hi_primitive`, such as jnp.searchsorted since 0.12. None for any other."""
    prim: Any = eqn.params.get("_prim")
    if not hasattr(prim, "expand"):
        return None

    def flat(*leaves: Any) -> list[Any]:
        with _looking_inside():
            tree = prim.in_tree
        return jax.tree.leaves(prim.expand(*jax.tree.unflatten(tree, leaves)))

    return trace(flat, *(jax.ShapeDtypeStruct(shape(v), dtype(v)) for v in eqn.inputs))


def name_of(eqn: Equation) -> str:
    """The name of an equation's primitive, as JAX prints it."""
    return eqn.primitive.name


class Scan(NamedTuple):
    """A scan: its inputs are `num_consts` constants, `num_carry` carried values, and what is scanned over."""

    body: Program
    num_consts: int
    num_carry: int
    length: int
    run: Callable[..., Any]  # jax.lax.scan with this scan's settings


def scan_of(eqn: Equation) -> Scan:
    """The parts of a SCAN."""
    if "num_consts" in eqn.params:
        num_consts, num_carry = eqn.params["num_consts"], eqn.param("num_carry")
    else:
        with _looking_inside():
            num_consts, num_carry, _ = (len(list(part)) for part in eqn.param("ft_in").unpack())
    settings = {name: eqn.param(name) for name in ("length", "reverse", "unroll")}
    run = functools.partial(jax.lax.scan, **settings)
    return Scan(_program(eqn.param("jaxpr")), num_consts, num_carry, settings["length"], run)


class Remat(NamedTuple):
    """A function under jax.checkpoint."""

    body: Program
    wrap: Callable[..., Any]  # jax.checkpoint with this one's settings


def is_remat(eqn: Equation) -> bool:
    return eqn.primitive is _REMAT or type(eqn.params.get("_prim")).__name__ == _NEW_REMAT


def remat_of(eqn: Equation) -> Remat:
    """The parts of an equation that `is_remat`."""
    if eqn.primitive is _REMAT:
        jaxpr, policy, cse = map(eqn.param, ("jaxpr", "policy", "prevent_cse"))
    else:
        with _looking_inside():
            new = eqn.param("_prim")
            jaxpr, policy, cse = new.jaxpr, new.policy, getattr(new, "prevent_cse", True)
    cse = cse if isinstance(cse, bool) else any(cse)  # since 0.12 perhaps one for each input
    return Remat(_program(jaxpr), functools.partial(jax.checkpoint, policy=policy, prevent_cse=cse))


class While(NamedTuple):
    """A while loop. Each program takes its own constants (`num_test`, `num_body` of them), then the carried values."""

    test: Program
    body: Program
    num_test: int
    num_body: int


def while_of(eqn: Equation) -> While:
    """The parts of a while loop."""
    test, body = _program(eqn.param("cond_jaxpr")), _program(eqn.param("body_jaxpr"))
    return While(test, body, eqn.param("cond_nconsts"), eqn.param("body_nconsts"))


# by name: jax.extend.core.primitives has only some of these
_SUMS = {"psum", "psum_invariant", "pmax", "pmin"}
_CASTS = {"pvary", "pcast"}


def summed_axes(eqn: Equation) -> tuple[Any, ...] | None:
    """The mapped axes of a sum or maximum over devices; () for a cast that declares over which axes an array varies;
    None for other equations."""
    name = eqn.primitive.name
    if name in _CASTS:
        return ()
    return tuple(eqn.param("axes")) if name in _SUMS else None


def held_programs(eqn: Equation) -> list[Program] | None:
    """The programs in an equation of any kind, without their constants. None if there are none; an empty list if there
    is one that cannot be inspected."""
    held = [_program_with(jaxpr, [None] * len(jaxpr.constvars)) for jaxpr in jaxprs_in_params(eqn.params)]
    return held if held or "_prim" in eqn.params else None


# ---------------------------------------------------------------------------------------------------------------------
# evaluation


def evaluate(program: Program, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation as JAX does, with its source line, name stack and context."""
    by_variable = {v: x for v, x in zip(eqn.inputs, values, strict=True) if not isinstance(v, Literal)}
    jaxpr = program.jaxpr.replace(
        constvars=[],
        invars=list(by_variable),
        outvars=eqn.outputs,
        eqns=[eqn.jaxpr_eqn],
        effects=eqn.jaxpr_eqn.effects,
        debug_info=program.jaxpr.debug_info.with_unknown_names(),
    )
    return list(eval_jaxpr(jaxpr, (), *by_variable.values()))


def bind(eqn: Equation, values: Sequence[Any], **changes: Any) -> list[Any]:
    """Evaluates one equation on values of other shapes, with some of its parameters changed."""
    with _looking_inside():
        primitive, context = eqn.primitive, eqn.jaxpr_eqn.ctx.manager
        params: Any = primitive.get_bind_params(eqn.params | changes)
    functions, params = params if isinstance(params, tuple) else ((), params)
    with context:
        out = primitive.bind(*functions, *map(jax.numpy.asarray, values), **params)
    return list(out) if primitive.multiple_results else [out]


def at_line_of(eqn: Equation, fun: Callable[..., Any], *args: Any) -> Any:
    """fun(*args), a pytree of arrays. Its equations get the source line of `eqn`."""
    leaves, tree = jax.tree.flatten(args)
    out_tree: list[Any] = []

    def flat(*leaves: Any) -> list[Any]:
        outs, structure = jax.tree.flatten(fun(*jax.tree.unflatten(tree, leaves)))
        out_tree[:] = [structure]
        return outs

    closed = jax.make_jaxpr(flat)(*leaves)
    with _looking_inside():
        line = eqn.jaxpr_eqn.source_info
        jaxpr = closed.jaxpr.replace(eqns=[e.replace(source_info=line) for e in closed.jaxpr.eqns])
    return out_tree[0].unflatten(eval_jaxpr(jaxpr, closed.consts, *leaves))


def zeros_like_output(v: Any) -> Any:
    """Zeros of the shape, dtype and varying axes of a variable."""
    zeros = jax.numpy.zeros(v.aval.shape, v.aval.dtype)
    with _looking_inside():
        return vary(zeros, v.aval.manual_axis_type.varying)


class Needed:
    """fun(*args), a list of arrays, traced without equations (or prints) that the arrays do not need.

    Attributes:
      used: for each leaf of args, whether it is needed.
      has_effects: whether a needed equation has side effects.
      outputs_with_effects: the numbers of the outputs that need such an equation.
      numbers: a number for each output; equal for outputs that are computed in the same way.
      sizes: the sizes of the outputs.
      program: the program. Its inputs are the leaves that are used.
    """

    def __init__(self, fun: Callable[..., list[Any]], args: Any) -> None:
        closed = jax.make_jaxpr(fun)(*args)
        jaxpr = _needed_only(closed.jaxpr)
        self._jaxpr, self.used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
        self.program = _program_with(self._jaxpr, closed.consts)
        self.has_effects = _has_effects(self._jaxpr)
        outputs = enumerate(self._jaxpr.outvars if self.has_effects else ())
        needed = ((i, _needed_only(self._jaxpr.replace(outvars=[v]))) for i, v in outputs)
        self.outputs_with_effects = {i for i, jaxpr in needed if _has_effects(jaxpr)}
        self.numbers = _value_numbers(self._jaxpr)
        self.sizes = [math.prod(shape(v)) for v in self._jaxpr.outvars]

    def __call__(self, args: Sequence[Any]) -> list[Any]:
        """The outputs. `args` are the leaves that are used."""
        return list(eval_jaxpr(self._jaxpr, list(self.program.constants.values()), *args))


def _has_effects(jaxpr: Any) -> bool:
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in jaxpr.effects)


def _needed_only(jaxpr: Any) -> Any:
    """A jaxpr without equations that its outputs do not need, even if these have effects."""
    needed, kept = {v for v in jaxpr.outvars if not isinstance(v, Literal)}, []
    for eqn in reversed(jaxpr.eqns):
        if needed & set(eqn.outvars):
            kept.append(eqn)
            needed |= {v for v in eqn.invars if not isinstance(v, Literal)}
    return jaxpr.replace(eqns=kept[::-1], effects=set().union(*(eqn.effects for eqn in kept)))


def needed_only(program: Program) -> Program:
    """A program without equations that its outputs do not need, even if these have effects."""
    return _program_with(_needed_only(program.jaxpr), list(program.constants.values()))


def used_inputs(program: Program) -> list[int]:
    """The numbers of the inputs that some equation of a program uses."""
    used = {v for eqn in program.equations for v in eqn.inputs if not is_literal(v)}
    return [i for i, v in enumerate(program.inputs) if v in used]


def _value_numbers(jaxpr: Any) -> list[int]:
    numbers: dict[Any, int] = {}
    of: dict[Any, int] = {}

    def number(v: Any) -> int:
        if isinstance(v, Literal):
            return numbers.setdefault(_description_of_literal(v), len(numbers))
        return of[v] if v in of else of.setdefault(v, numbers.setdefault(v, len(numbers)))

    for eqn in jaxpr.eqns:
        key = (eqn.primitive, _description(eqn.params), *map(number, eqn.invars))
        for i, v in enumerate(eqn.outvars):
            of[v] = numbers.setdefault((key, i), len(numbers))
    return [number(v) for v in jaxpr.outvars]


def description(eqn: Equation) -> Any:
    """A key that is equal for equations that do the same with equal operands, and for no others."""
    return eqn.primitive, _description(eqn.params)


def _description(x: Any) -> Any:
    """A key that is equal for parameters that mean the same, and for no others. A program with constants equals no
    other."""
    if isinstance(x, dict):
        return tuple((name, _description(value)) for name, value in sorted(x.items()))
    if isinstance(x, list | tuple):
        return type(x).__name__, tuple(map(_description, x))
    jaxpr = getattr(x, "jaxpr", x)
    if hasattr(jaxpr, "eqns"):
        if getattr(x, "consts", ()) or jaxpr.constvars or getattr(jaxpr, "consts", ()):
            return object()
        literals = [v for operands in (*(eqn.invars for eqn in jaxpr.eqns), jaxpr.outvars) for v in operands]
        literals = [_description_of_literal(v) for v in literals if isinstance(v, Literal)]
        return str(jaxpr), tuple(literals), tuple(_description(eqn.params) for eqn in jaxpr.eqns)
    try:
        hash(x)
    except TypeError:
        return object()
    return x


def _description_of_literal(v: Any) -> Any:
    """A key of a literal's type and bits. JAX prints only some digits."""
    return "literal", str(v.aval), np.asarray(v.val).tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# values


def is_traced(x: object) -> bool:
    return isinstance(x, Tracer)


def is_array_or_number(x: object) -> bool:
    """Whether `x` is an array or number, which a traced function may return."""
    return valid_jaxtype(x)


def kind_of_array(x: Any) -> tuple[tuple[int, ...], Any, bool]:
    """(shape, dtype, whether the type is weak) of an array or number. A jitted function compiles for each of these."""
    aval: Any = x.aval if isinstance(x, jax.Array) else jax.typeof(x)
    return aval.shape, aval.dtype, getattr(aval, "weak_type", False)


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """A ShapeDtypeStruct that is traced like x."""
    shape, dtype, weak = kind_of_array(x)
    return jax.ShapeDtypeStruct(shape, dtype, weak_type=weak)


def settings() -> tuple[Any, ...]:
    """The mesh and the settings of JAX that change a traced program. They are part of a cache key."""
    return (jax.sharding.get_abstract_mesh(), *(getattr(jax.config, name) for name in _SETTINGS))


_SETTINGS = [f"jax_{name}" for name in "enable_x64 threefry_partitionable default_matmul_precision".split()]
_SETTINGS += [f"jax_{name}" for name in "default_prng_impl numpy_dtype_promotion numpy_rank_promotion".split()]


@contextlib.contextmanager
def auto_mesh() -> Iterator[bool]:
    """A context in which Explicit axes of the mesh (jax.set_mesh) are Auto, so that a program is traced without the
    shardings of its arrays. Yields whether there are such axes."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    changed = {name: AxisType.Auto for name, kind in kinds if kind == AxisType.Explicit}
    if not changed:
        yield False
        return
    try:
        with jax.sharding.use_abstract_mesh(mesh.update_axis_types(changed)):
            yield True
    except ValueError as error:
        if "mesh" in str(error) or "Auto" in str(error):
            error.add_note(
                "js.jit and js.rowwise trace a step on an Explicit mesh as on an Auto one. Leave out_sharding= and "
                "jax.sharding.reshard out of it, and pass arrays that it closes over as arguments."
            )
        raise


def placement(arrays: Iterable[Any]) -> frozenset[Any]:
    """{(device, whether the array is committed to it)} of all arrays."""
    found = (x for x in arrays if isinstance(x, jax.Array))
    return frozenset((device, getattr(x, "committed", False)) for x in found for device in x.devices())


def is_on_host(x: Any) -> bool:
    """Whether `x` is a NumPy array, a number, an array on one CPU, or an abstract array without a device."""
    devices = _devices(x)
    return len(devices) <= 1 and all(device.platform == "cpu" for device in devices)


def on_one_device(arrays: Iterable[Any]) -> bool:
    """Whether all arrays are on the same single device."""
    return len(frozenset().union(*map(_devices, arrays))) <= 1


def _devices(x: Any) -> frozenset[Any]:
    """The devices of an array or abstract array; empty for NumPy arrays."""
    sharding = getattr(x, "sharding", None)
    return frozenset() if sharding is None else frozenset(sharding.device_set)


def platform_of(arrays: Iterable[Any]) -> str:
    """The platform on which a program of these arrays, which may be abstract, runs."""
    devices = next(filter(None, map(_devices, arrays)), None)
    return jax.default_backend() if devices is None else next(iter(devices)).platform


def without_repeats(arrays: Sequence[Any], kept: Sequence[Any] = ()) -> list[Any]:
    """The arrays, with copies of those that occur before or in `kept`. A donated buffer must not be passed twice."""
    seen = set(map(id, kept))
    out = []
    for x in arrays:
        out.append(jax.numpy.copy(x) if isinstance(x, jax.Array) and id(x) in seen else x)
        seen.add(id(x))
    return out


def opaque_dtype(name: str, tag: str, refuse: Callable[..., Any]) -> Any:
    """A dtype that arithmetic refuses: an `impl` of jax.random.wrap_key_data with a uint32 word for each element. JAX's
    errors print `tag`. `refuse` is called if the elements are used as random keys."""
    return define_prng_impl(
        key_shape=(1,), seed=refuse, split=refuse, random_bits=refuse, fold_in=refuse, name=name, tag=tag
    )


@functools.cache
def pallas() -> tuple[Any, Any]:
    """(jax.experimental.pallas, its TPU module), imported at first use, which takes as long as importing jaxsparse."""
    try:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu
    except ImportError as error:
        raise ImportError(_unknown(error)) from error
    return pl, pltpu


# Unless check_vma=False, jax.shard_map checks over which mapped axes each array varies.


def varying_axes(tree: Any) -> frozenset[Any]:
    """The mapped axes over which some leaf varies; empty if shard_map does not check that."""
    return frozenset().union(*map(_varying, _arrays(tree)))


def vary(tree: Any, axes: Iterable[Any]) -> Any:
    """The tree with leaves that vary over `axes`, if shard_map checks that. Values stay the same."""

    def one(x: Any) -> Any:
        new = tuple(axis for axis in axes if axis not in varying_axes(x))
        return pcast(x, new, to="varying") if new else x

    return jax.tree.map(one, tree)


def all_gather(x: jax.Array, axis_name: Any) -> jax.Array:
    """The x (k, ...) of all devices, in device order: (n * k, ...), the same on all of them."""
    if not varying_axes(x):
        return jax.lax.all_gather(x, axis_name, tiled=True)
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    return jax.lax.all_gather(vary(x, names), axis_name, tiled=True, to="invarying")


def _arrays(tree: Any) -> Iterator[jax.Array]:
    return (x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))


def _varying(x: jax.Array) -> frozenset[Any]:
    with _looking_inside():
        return jax.typeof(x).manual_axis_type.varying
