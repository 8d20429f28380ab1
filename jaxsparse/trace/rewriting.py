"""The base of `joined` and `stacked`: a walk through a program that replaces some equations by others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsparse import _jax
from jaxsparse._jax import Equation, Program


class Rewriting:
    """A walk through a program. Its values are arrays, or objects that stand for arrays.

    Attributes:
      within: the equations that the present one is inside of, then the present one.
    """

    def __init__(self) -> None:
        self.within: tuple[Equation, ...] = ()

    def walk(self, program: Program, values: Sequence[Any]) -> list[Any]:
        """The outputs of a program. `values` are its inputs."""
        env: dict[Any, Any] = dict(program.constants)
        env.update(zip(program.inputs, values, strict=True))

        def read(v: Any) -> Any:
            return np.asarray(_jax.literal_value(v), _jax.dtype(v)) if _jax.is_literal(v) else env[v]

        for eqn in program.equations:
            self.within += (eqn,)
            outs = self.step(program, eqn, [read(v) for v in eqn.inputs])
            self.within = self.within[:-1]
            env.update(zip(eqn.outputs, outs, strict=True))
        return [read(v) for v in program.outputs]

    def step(self, program: Program, eqn: Equation, values: list[Any]) -> list[Any]:
        """The outputs of an equation."""
        raise NotImplementedError
