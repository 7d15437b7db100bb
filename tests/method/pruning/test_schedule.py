"""Sparsity as a function of the step."""

import pytest

from tscnc_hf.method.pruning.schedule import SCHEDULES, sparsity_at


def test_the_cubic_one_between_its_ends():
    assert sparsity_at(3, 10, 50, 0.9) == 0.0
    assert sparsity_at(50, 10, 50, 0.9) == 0.9 and sparsity_at(1000, 10, 50, 0.9) == 0.9
    assert sparsity_at(30, 10, 50, 0.8) == pytest.approx(0.8 * (1 - 0.5**3))
    assert sparsity_at(20, 10, 50, 0.8, initial=0.4) == pytest.approx(0.8 - 0.4 * 0.75**3)


def test_linear_and_one_shot():
    assert sparsity_at(20, 10, 50, 0.8, initial=0.4, schedule="linear") == pytest.approx(0.5)
    assert sparsity_at(9, 10, 50, 0.8, schedule="one-shot") == 0.0
    assert sparsity_at(10, 10, 50, 0.8, schedule="one-shot") == 0.8


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_none_falls_and_all_end_at_the_target(schedule):
    values = [sparsity_at(step, 10, 50, 0.95, initial=0.3, schedule=schedule) for step in range(60)]
    assert values == sorted(values) and values[0] == 0.3 and values[50:] == [0.95] * 10


def test_an_unknown_one_is_named():
    with pytest.raises(ValueError, match="'cosine' is unknown; use one of cubic, linear, one-shot"):
        sparsity_at(1, 0, 2, 0.5, schedule="cosine")
