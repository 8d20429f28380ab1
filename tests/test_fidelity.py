"""A sample of the cases of `python -m tests.fidelity`: replay is no further from float64 optax than float32 optax."""

import dataclasses

import jax
import numpy as np
import pytest

from tests import fidelity

# Turns of different optimizers, steps, and what is drawn then: the tables' dtype and number. The first case goes
# through its history of 1,024 steps more than once.
SAMPLE = {
    "adamw, mask": (10, 1200, "bfloat16", 1),
    "nesterov": (8, 60, "float32", 3),
    "rmsprop, centered": (5, 60, "float32", 1),
    "adam": (0, 60, "bfloat16", 1),
}
SLOW = ("nesterov", "rmsprop, centered", "adam")


def group_of(turn, steps, **changes):
    """A group that is drawn for this turn alone, of three cases."""
    drawn = fidelity.draw_group(np.random.default_rng(turn), turn, steps, cases=3)
    return dataclasses.replace(drawn, **changes)


def is_exact(group):
    labels, findings = fidelity.run_group(group)
    assert [f for f in findings if f.violates] == [], (group, labels)
    assert {f.slot for f in findings} > {"p"}  # moments were compared too


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in SAMPLE]
)
def test_replay_is_as_exact_as_dense_float32(name):
    turn, steps, dtype, tables = SAMPLE[name]
    group = group_of(turn, steps, injected=False)
    assert (group.optimizer, group.dtype, len(group.shapes)) == (name, dtype, tables)
    assert steps < 1000 or group.history < steps
    is_exact(group)


@pytest.mark.slow
def test_one_table_alone():
    group = group_of(8, 60, injected=False, tables=0)
    assert group.optimizer == "nesterov"
    is_exact(group)


BY_HAND = group_of(0, 60, injected=True, form="by hand", clip=0.1, dtype="float32")


@pytest.mark.slow
def test_injected_rates_and_steps_by_hand():
    assert BY_HAND.optimizer == "adam"
    is_exact(BY_HAND)


def test_freezing_violates_the_criterion_by_far():
    _, findings = fidelity.run_group(BY_HAND, freeze=True)
    missed = [f for f in findings if 0 < f.touches < 4]
    assert sum(f.replay > 1000 * f.tolerance for f in missed) > len(missed) / 2


def test_the_reference_leaves_x64_alone():
    assert not jax.config.jax_enable_x64
    _, _, (want, _), got = fidelity.reference(BY_HAND)
    assert {x.dtype for x in want.values()} == {np.dtype(np.float64)} and not jax.config.jax_enable_x64
    assert {x.dtype for x in got.values()} == {np.dtype(np.float32)}
