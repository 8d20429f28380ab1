"""Which cases of a test the README's command leaves out."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(quick: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases of a parameter. All but the quick ones are slow: there are many of them, each like a quick one."""
    cases = list(cases)
    assert set(quick) <= set(cases), f"no cases: {set(quick) - set(cases)}"
    slow = [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]
    return [case if case in quick else param for case, param in zip(cases, slow, strict=True)]
