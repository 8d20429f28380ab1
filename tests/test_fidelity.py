"""A sample of the cases of `python -m tests.fidelity`: replay is no further from float64 optax than float32 optax."""

import dataclasses

import jax
import numpy as np
import pytest

from tests import fidelity

# Turns of different optimizers, and steps: the second goes through its history of 1,024 steps more than once.
SAMPLE = {"adam": (0, 60), "adamw, mask": (10, 1200), "nesterov": (8, 60), "rmsprop, centered": (5, 60)}


def group_of(turn, steps, **changes):
    """A group that is drawn for this turn alone, of three cases."""
    drawn = fidelity.draw_group(np.random.default_rng(turn), turn, steps, cases=3)
    return dataclasses.replace(drawn, **changes)


@pytest.mark.parametrize("name", SAMPLE)
def test_replay_is_as_exact_as_dense_float32(name):
    turn, steps = SAMPLE[name]
    group = group_of(turn, steps, injected=False)
    assert group.optimizer == name and (steps < 1000 or group.history < steps)
    labels, findings = fidelity.run_group(group)
    assert [f for f in findings if f.violates] == [], (group, labels)
    assert {f.slot for f in findings} > {"p"}  # moments were compared too


def test_injected_rates_and_steps_by_hand():
    group = group_of(0, 60, injected=True, form="by hand", clip=0.1, dtype="float32")
    _, findings = fidelity.run_group(group)
    assert [f for f in findings if f.violates] == []


def test_bfloat16_tables():
    group = group_of(0, 60, injected=False, clip=None, dtype="bfloat16")
    _, findings = fidelity.run_group(group)
    assert [f for f in findings if f.violates] == []


def test_freezing_violates_the_criterion_by_far():
    group = group_of(0, 60, injected=False, dtype="float32")
    _, findings = fidelity.run_group(group, freeze=True)
    missed = [f for f in findings if 0 < f.touches < 4]
    assert sum(f.replay > 1000 * f.tolerance for f in missed) > len(missed) / 2


def test_the_reference_leaves_x64_alone():
    assert not jax.config.jax_enable_x64
    want, _ = _dense(np.float64)
    got, _ = _dense(np.float32)
    assert {x.dtype for x in want.values()} == {np.dtype(np.float64)} and not jax.config.jax_enable_x64
    assert {x.dtype for x in got.values()} == {np.dtype(np.float32)}


def _dense(dtype):
    group = group_of(0, 9, cases=1)
    case, _ = fidelity.draw_case(np.random.default_rng(0), group)
    with jax.enable_x64(dtype == np.float64):
        return fidelity.run_dense(group, jax.tree.map(lambda x: x[None], case), dtype)
