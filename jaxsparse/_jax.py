"""Whatever JAX does not promise to keep, in one room: all other files see it through here.

`TESTED` are the versions of JAX that the tests were run with: with the one in between, those of the README's command.
What this room leans on:

* The result of jax.make_jaxpr: `eqns`, `invars`, `outvars`, `constvars`, `consts`, `effects`, `debug_info`, `replace`
  of a program, which since 0.11 holds its own constants; `primitive`, `params`, `invars`, `outvars`, `effects`,
  `source_info.traceback.frames` of an equation; `aval` of a variable, `val` of a jax.extend.core.Literal. `Program` and
  `Equation` are what the other rooms see of them.
* jax.extend.core.primitives: an equation's primitive is one of these objects, and is compared as an object. Only the
  new remat (jax_remat3) has no object there: it is a `call_hi_primitive` with a `_prim` that has a `jaxpr`.
* Parameters of equations: jit `jaxpr`, `name`; closed_call `call_jaxpr`; remat `jaxpr`, `policy`, `prevent_cse`; scan
  `jaxpr`, `length`, `reverse`, `unroll`, and `num_consts`, `num_carry` (until 0.10) or `ft_in` (since 0.11); cond
  `branches`; gather `dimension_numbers`, `slice_sizes`, `mode`, `fill_value`; dynamic_slice `slice_sizes`;
  convert_element_type `new_dtype`; reduce_sum `axes`; while `cond_jaxpr`, `body_jaxpr`, `cond_nconsts`,
  `body_nconsts`; scatter, broadcast_in_dim, reshape, slice, pad, transpose, squeeze, rev, dot_general, concatenate,
  sort, split, stack, unstack and top_k what they are called with in jax.lax; psum, pmax, pmin and psum_invariant
  `axes`. Of any other equation, jax.extend.core.jaxprs_in_params tells which programs it holds.
* Names of primitives that jax.extend.core.primitives does not list: psum_invariant, pvary, pcast, split, stack and
  unstack. And `jaxsparse/export`, which writes equations down in NumPy, knows all of them by their names and
  parameters, and refuses those that it does not know. custom_jvp_call and custom_vjp_call have a `call_jaxpr`.
* jax.core.eval_jaxpr and jax.interpreters.partial_eval.dce_jaxpr evaluate a program or what is needed of it;
  `get_bind_params` and `bind` of a primitive, in an equation's `ctx.manager`, evaluate one with other parameters;
  `replace` of an equation gives it another `source_info`.
* `effects` of a program, among which NamedAxisEffect says that it uses a mapped axis; `weak_type` of an array's type.
* jax.extend.random.define_prng_impl makes a dtype that arithmetic refuses.
* jax.experimental.pallas and jax.experimental.pallas.tpu, which are public and may change: `pallas_call`, `BlockSpec`,
  `ANY`, `SMEM`, `SemaphoreType.DMA`, `make_async_copy`, `ds`, `when`. They are imported where they are first needed.
* jax.core.Tracer, jax.extend.core.valid_jaxtype, and `manual_axis_type.varying` of jax.typeof with jax.lax.pcast.

What is missing raises here, at import or when it is first asked for, with the version found and the versions tested.
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
    """Around what reads the fields of JAX's own objects."""
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
    """A traced function. Its variables are opaque keys, of which `shape` and `dtype` tell more."""

    constants: dict[Any, Any]  # by variable
    inputs: Sequence[Any]  # variables
    outputs: Sequence[Any]  # variables and literals
    equations: Sequence[Equation]
    jaxpr: Any  # JAX's own, for this room


class Equation(NamedTuple):
    """One operation of a program."""

    primitive: Any
    params: dict[str, Any]
    inputs: Sequence[Any]  # variables and literals
    outputs: Sequence[Any]  # variables
    jaxpr_eqn: Any  # JAX's own, for this room

    @property
    def key(self) -> Any:
        """The same for the same equation whenever its program is looked at."""
        return self.jaxpr_eqn

    def param(self, name: str) -> Any:
        """The parameter of this name; RuntimeError where the equation has none."""
        if name not in self.params:
            raise RuntimeError(_unknown(f"{self.primitive} equations have no {name!r}"))
        return self.params[name]


def trace(fun: Callable[..., Any], *args: Any) -> Program:
    """The program of fun(*args), its inputs being the leaves of args."""
    return _program(jax.make_jaxpr(fun)(*args))


def _program(closed: Any) -> Program:
    """Of a jaxpr, which has its constants or needs none."""
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
    """Whether what stands in a program is a number, and no variable."""
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
    """What one of `CALLS` calls."""
    return _program(eqn.params["call_jaxpr"] if "call_jaxpr" in eqn.params else eqn.param("jaxpr"))


def called_name(eqn: Equation) -> str | None:
    """The name of the function that is called, if this equation is a call of one."""
    return eqn.params.get("name") if eqn.primitive in CALLS else None


def branches(eqn: Equation) -> list[Program]:
    """Of a COND."""
    return [_program(branch) for branch in eqn.param("branches")]


def inlined(eqn: Equation) -> Program | None:
    """What an equation calls once, with its inputs as they are: of calls, and of functions with derivatives of their
    own or under jax.checkpoint. None of any other."""
    if is_remat(eqn):
        return remat_of(eqn).body
    if eqn.primitive in CALLS or eqn.primitive in _WITH_DERIVATIVES:
        return called(eqn)
    return None


def name_of(eqn: Equation) -> str:
    """The name of what an equation does, as it is printed."""
    return eqn.primitive.name


class Scan(NamedTuple):
    """A scan: its inputs are `num_consts` constants, `num_carry` carried values, and what is scanned over."""

    body: Program
    num_consts: int
    num_carry: int
    length: int
    run: Callable[..., Any]  # jax.lax.scan with this scan's settings


def scan_of(eqn: Equation) -> Scan:
    """Of a SCAN."""
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
    """Of an equation that `is_remat`."""
    if eqn.primitive is _REMAT:
        jaxpr, policy, cse = map(eqn.param, ("jaxpr", "policy", "prevent_cse"))
    else:
        with _looking_inside():
            new = eqn.param("_prim")
            jaxpr, policy, cse = new.jaxpr, new.policy, getattr(new, "prevent_cse", True)
    cse = cse if isinstance(cse, bool) else any(cse)  # since 0.12 perhaps one for each input
    return Remat(_program(jaxpr), functools.partial(jax.checkpoint, policy=policy, prevent_cse=cse))


class While(NamedTuple):
    """A while loop: both programs take their own constants, then what is carried."""

    test: Program
    body: Program
    num_test: int
    num_body: int


def while_of(eqn: Equation) -> While:
    """Of a while loop."""
    test, body = _program(eqn.param("cond_jaxpr")), _program(eqn.param("body_jaxpr"))
    return While(test, body, eqn.param("cond_nconsts"), eqn.param("body_nconsts"))


# of these, jax.extend.core.primitives has some only
_SUMS = {"psum", "psum_invariant", "pmax", "pmin"}
_CASTS = {"pvary", "pcast"}


def summed_axes(eqn: Equation) -> tuple[Any, ...] | None:
    """The mapped axes that a sum or maximum over devices is over; none of a cast that says over which axes an array
    varies; None if it is neither."""
    name = eqn.primitive.name
    if name in _CASTS:
        return ()
    return tuple(eqn.param("axes")) if name in _SUMS else None


def held_programs(eqn: Equation) -> list[Program] | None:
    """The programs in an equation of any kind, known to this library or not; None where there are none. A list without
    any stands for one that cannot be seen. They come without their constants."""
    held = [_program_with(jaxpr, [None] * len(jaxpr.constvars)) for jaxpr in jaxprs_in_params(eqn.params)]
    return held if held or "_prim" in eqn.params else None


# ---------------------------------------------------------------------------------------------------------------------
# evaluation


def evaluate(program: Program, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """One equation of a program, as JAX itself evaluates it: with its own source line, name stack and context."""
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
    """One equation on values of other shapes, with some of its parameters changed."""
    with _looking_inside():
        primitive, context = eqn.primitive, eqn.jaxpr_eqn.ctx.manager
        params: Any = primitive.get_bind_params(eqn.params | changes)
    functions, params = params if isinstance(params, tuple) else ((), params)
    with context:
        out = primitive.bind(*functions, *map(jax.numpy.asarray, values), **params)
    return list(out) if primitive.multiple_results else [out]


def at_line_of(eqn: Equation, fun: Callable[..., Any], *args: Any) -> Any:
    """fun(*args), a pytree of arrays, whose equations have the source line of another one."""
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
    """fun(*args), a list of arrays, traced without anything that these do not need, what it prints included.

    Attributes:
      used: which of the args are needed.
      has_effects: whether something of what is needed has effects on the outside.
      outputs_with_effects: the numbers of the outputs that need something that has.
      numbers: for each output a number, equal for outputs that are computed in the same way.
      sizes: of the outputs.
      program: whose inputs are the args that are used.
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
        """The outputs, given those of the args that are used."""
        return list(eval_jaxpr(self._jaxpr, list(self.program.constants.values()), *args))


def _has_effects(jaxpr: Any) -> bool:
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in jaxpr.effects)


def _needed_only(jaxpr: Any) -> Any:
    """A jaxpr without the equations that its outputs do not need, whatever their effects are."""
    needed, kept = {v for v in jaxpr.outvars if not isinstance(v, Literal)}, []
    for eqn in reversed(jaxpr.eqns):
        if needed & set(eqn.outvars):
            kept.append(eqn)
            needed |= {v for v in eqn.invars if not isinstance(v, Literal)}
    return jaxpr.replace(eqns=kept[::-1], effects=set().union(*(eqn.effects for eqn in kept)))


def needed_only(program: Program) -> Program:
    """A program without the equations that its outputs do not need, whatever their effects are."""
    return _program_with(_needed_only(program.jaxpr), list(program.constants.values()))


def used_inputs(program: Program) -> list[int]:
    """The numbers of the inputs that a program does something with."""
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
    """Equal for equations that do the same with equal operands, and for no others."""
    return eqn.primitive, _description(eqn.params)


def _description(x: Any) -> Any:
    """Equal for parameters that mean the same, and for no others: programs with constants equal nothing."""
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
    """Its bits: JAX prints a few of its digits."""
    return "literal", str(v.aval), np.asarray(v.val).tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# values


def is_traced(x: object) -> bool:
    return isinstance(x, Tracer)


def is_array_or_number(x: object) -> bool:
    """Whether a traced function may return it."""
    return valid_jaxtype(x)


def kind_of_array(x: Any) -> tuple[tuple[int, ...], Any, bool]:
    """What decides which program an array or number needs: shape, dtype, whether its type is weak."""
    aval: Any = x.aval if isinstance(x, jax.Array) else jax.typeof(x)
    return aval.shape, aval.dtype, getattr(aval, "weak_type", False)


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """A stand-in that is traced as x is."""
    shape, dtype, weak = kind_of_array(x)
    return jax.ShapeDtypeStruct(shape, dtype, weak_type=weak)


def settings() -> tuple[Any, ...]:
    """What JAX traces by, beside the arguments."""
    return (jax.sharding.get_abstract_mesh(), *(getattr(jax.config, name) for name in _SETTINGS))


_SETTINGS = [f"jax_{name}" for name in "enable_x64 threefry_partitionable default_matmul_precision".split()]
_SETTINGS += [f"jax_{name}" for name in "default_prng_impl numpy_dtype_promotion numpy_rank_promotion".split()]


@contextlib.contextmanager
def auto_mesh() -> Iterator[bool]:
    """Within it, the Explicit axes of the mesh in context (jax.set_mesh) are Auto ones, so that a program is traced
    without the shardings of its arrays. Yields whether there are such axes."""
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
    """The devices of arrays, and whether they are bound to them."""
    found = (x for x in arrays if isinstance(x, jax.Array))
    return frozenset((device, getattr(x, "committed", False)) for x in found for device in x.devices())


def is_on_host(x: Any) -> bool:
    """Whether an array is NumPy's, a number, or on one CPU; an abstract one may be."""
    devices = _devices(x)
    return len(devices) <= 1 and all(device.platform == "cpu" for device in devices)


def on_one_device(arrays: Iterable[Any]) -> bool:
    """Whether no array is spread over several devices, or on another one than the others are."""
    return len(frozenset().union(*map(_devices, arrays))) <= 1


def _devices(x: Any) -> frozenset[Any]:
    """Where an array is, or an abstract one would be; none of NumPy's."""
    sharding = getattr(x, "sharding", None)
    return frozenset() if sharding is None else frozenset(sharding.device_set)


def platform_of(arrays: Iterable[Any]) -> str:
    """Where a program of these arrays, or abstract ones, runs."""
    devices = next(filter(None, map(_devices, arrays)), None)
    return jax.default_backend() if devices is None else next(iter(devices)).platform


def without_repeats(arrays: Sequence[Any], kept: Sequence[Any] = ()) -> list[Any]:
    """The arrays, those being copied that are there already, or are kept: no buffer can be donated twice, nor used
    beside."""
    seen = set(map(id, kept))
    out = []
    for x in arrays:
        out.append(jax.numpy.copy(x) if isinstance(x, jax.Array) and id(x) in seen else x)
        seen.add(id(x))
    return out


def opaque_dtype(name: str, tag: str, refuse: Callable[..., Any]) -> Any:
    """A dtype that arithmetic refuses: the `impl` of jax.random.wrap_key_data for one uint32 word each. JAX prints the
    tag where it refuses; `refuse` is called where the words are used as random keys."""
    return define_prng_impl(
        key_shape=(1,), seed=refuse, split=refuse, random_bits=refuse, fold_in=refuse, name=name, tag=tag
    )


@functools.cache
def pallas() -> tuple[Any, Any]:
    """jax.experimental.pallas and what it has for TPU, imported late: that takes as long as all of jaxsparse."""
    try:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu
    except ImportError as error:
        raise ImportError(_unknown(error)) from error
    return pl, pltpu


# jax.shard_map checks, unless told not to, over which mapped axes each array varies.


def varying_axes(tree: Any) -> frozenset[Any]:
    """The mapped axes that some leaf varies over, as far as shard_map checks that; none without these checks."""
    return frozenset().union(*map(_varying, _arrays(tree)))


def vary(tree: Any, axes: Iterable[Any]) -> Any:
    """The tree, its leaves varying over `axes`, as far as shard_map checks that: of equal values on all devices, each
    device's own."""

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
