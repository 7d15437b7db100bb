"""How long calls take: in turns, so that a machine that is busy for a while is busy for all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tscnc_hf.method.numbers import finite_number, whole_number


@dataclass
class Timing:
    """Milliseconds of a call, in each turn."""

    calls: list[float]

    @property
    def least(self) -> float:
        return min(self.calls)

    @property
    def median(self) -> float:
        return statistics.median(self.calls)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile."""
        if len(self.calls) < 2:
            return self.calls[0], self.calls[0]
        low, _, high = statistics.quantiles(self.calls, n=4, method="inclusive")
        return low, high


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    least: int = 3,
    most: int = 200,
    after: Callable[[int], None] = lambda turn: None,
    burst: float = 0.0,
) -> dict[str, Timing]:
    """
    One call of each in turn, after one of each that does not count, until `seconds` have passed.

    Args:
        least, most: numbers of turns.
        after: called with the number of each turn that is done.
        burst: seconds for which each is called again and again in its turn, twice at least; the median counts, without
            the first call: some runtimes' threads go on spinning for a while, in the way of the next one's.

    Raises:
        ValueError: a number of turns below 1, or seconds below 0.
    """
    _check(seconds, least, most, burst)
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for turn in range(most):
        if turn >= least and time.perf_counter() > end:
            break
        for name, call in calls.items():
            taken[name].append(_milliseconds(call, burst))
        after(turn)
    return {name: Timing(times) for name, times in taken.items()}


SLACK = (1.3, 1.15, 1.1)  # times the fastest of a kind that a call may take to stay in a race, from the second turn on
BEHIND = 2.0  # times the fastest of all


def race(
    calls: Mapping[str, Callable[[], object]],
    kinds: Mapping[str, object],
    seconds: float,
    least: int = 5,
    most: int = 200,
    burst: float = 0.0,
) -> dict[str, float]:
    """
    Milliseconds of each call: the least that any took, times the median, over turns, of how many times as long as the
    fastest of the turn it takes; a machine that is slower for a while is so for all of them. As `interleaved`, but
    those that are well behind are soon left out, so that the time goes to telling the others apart.

    Args:
        kinds: of each; compared are those of a kind, and kinds only where one is twice as fast as another.
        least, most: numbers of turns of those that stay.
        burst: as of `interleaved`.

    Raises:
        ValueError: as `interleaved`.
    """
    _check(seconds, least, most, burst)
    for call in calls.values():
        call()
    behind: dict[str, list[float]] = {name: [] for name in calls}
    racing, shortest = list(calls), math.inf
    end = time.perf_counter() + seconds
    for turn in range(most):
        if turn >= least and (len(racing) == 1 or time.perf_counter() > end):
            break
        taken = {name: _milliseconds(calls[name], burst) for name in racing}
        fastest = min(taken.values())
        shortest = min(shortest, fastest)
        for name, milliseconds in taken.items():
            behind[name].append(milliseconds / fastest if fastest else 1.0)
        if not turn:  # one call says little
            continue
        best = {name: min(times) for name, times in behind.items()}  # whatever came in its way in other turns
        slack = SLACK[min(turn, len(SLACK)) - 1]
        of_kind = {kinds[name]: best[name] for name in sorted(calls, key=best.__getitem__, reverse=True)}
        racing = [name for name in racing if best[name] <= min(BEHIND, slack * of_kind[kinds[name]])]
    # of two turns the better: whatever came in its way in the other
    return {name: shortest * statistics.median_low(times) for name, times in behind.items()}


def _check(seconds: float, least: int, most: int, burst: float) -> None:
    for name, turns in (("least", least), ("most", most)):
        whole_number(name, turns, 1)
    for name, value in (("seconds", seconds), ("burst", burst)):
        finite_number(name, value)


def _milliseconds(call: Callable[[], object], burst: float) -> float:
    taken, begun = [], time.perf_counter()
    while len(taken) < (2 if burst else 1) or time.perf_counter() < begun + burst:
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(taken[1:] or taken)


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Timing:
    """Of calls that were made in turn: how many times as long one takes as the other."""
    return Timing([a / b for a, b in zip(numerator, denominator, strict=True)])
