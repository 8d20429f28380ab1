"""jax.lax.scan, and with it fori_loop and map: a function in `predict`, and a call of the helper `scan`."""

from __future__ import annotations

from jaxsparse.export.elementwise import Rule
from jaxsparse.export.flat import Operation
from jaxsparse.export.source import DEF, with_comments
from jaxsparse.export.writer import ATOM, Value, Writer, dtype_text, shape_text, size_text


def _tuple(texts: list[str]) -> str:
    return f"({', '.join(texts)}{',' * (len(texts) == 1)})"


def _scan(w: Writer, op: Operation) -> list[Value]:
    loop = op.loop
    assert loop is not None
    num_carry, num_slices = len(loop.carry), len(loop.slices)
    for x in op.reads:  # named here, so that no step computes it again
        w.named(w.value(x))
    inputs = op.inputs[len(op.inputs) - num_carry - num_slices :]
    values = [w.full(w.value(x)).text for x in inputs]

    def argument(x: int, hint: str) -> str:
        name, shape = w.new_name(hint), w.flat.shapes[x]
        w.known(x, Value(name, ATOM, shape, w.flat.dtypes[x], shape))
        return name

    arguments = [argument(x, "h") for x in loop.carry] + [argument(x, "element") for x in loop.slices]
    used = [i for i in range(num_carry, len(op.outputs)) if w.uses(op.outputs[i])]  # of the stacked results
    lines, outs = w.body(loop.operations, [*loop.outputs[:num_carry], *(loop.outputs[i] for i in used)])
    step = w.new_name("step")
    body = [*with_comments(lines), f"return {_tuple([out.text for out in outs])}"]
    function = [f"{DEF}{step}({', '.join(arguments)}):", *(f"    {line}" for line in body)]
    w.lines.append((step, "\n".join(function), None))

    types = [(w.flat.shapes[op.outputs[i]], w.flat.dtypes[op.outputs[i]]) for i in used]
    stacked = [f"np.empty({shape_text(shape)}, {dtype_text(dtype)})" for shape, dtype in types]
    groups = [_tuple(values[:num_carry]), _tuple(values[num_carry:]), _tuple(stacked)]
    options = ", reverse=True" if op.param("reverse") else ""
    text = f"{w.helper('scan')}({step}, {size_text(op.param('length'))}, {', '.join(groups)}{options})"
    results = w.named(w.out(op, text), "results")
    place = {**{i: i for i in range(num_carry)}, **{i: num_carry + j for j, i in enumerate(used)}}
    return [w.out(op, f"{results.text}[{place.get(i, 0)}]", number=i) for i in range(len(op.outputs))]


RULES: dict[str, Rule] = {"scan": _scan}
