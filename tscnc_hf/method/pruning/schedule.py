"""How sparse a network is to be at a step of training: pure functions of the step."""

from __future__ import annotations

from collections.abc import Callable


# progress in [0, 1) between the ends of the schedule -> share of the way to the target
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cubic": lambda progress: 1.0 - (1.0 - progress) ** 3,
    "linear": lambda progress: progress,
    "one-shot": lambda progress: 1.0,
}


def sparsity_at(
    step: int, start: int, end: int, target: float, initial: float = 0.0, schedule: str = "cubic"
) -> float:
    """
    Sparsity after a step: `initial` before start, `target` from `end` on, between them as the schedule says.

    Args:
        step, start, end (`int`): optimizer steps; pruning happens in [start, end], start <= end.
        target, initial (`float`): fractions of zeros, in [0, 1).
        schedule (`str`): "cubic" (Zhu and Gupta 2017, eq. 1: fast at first), "linear", or "one-shot" (the target from
            start on).

    Raises:
        ValueError: unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"pruning_schedule={schedule!r} is unknown; use one of {', '.join(SCHEDULES)}")
    if step < start:
        return initial
    if step >= end:
        return target
    return initial + (target - initial) * SCHEDULES[schedule]((step - start) / (end - start))
