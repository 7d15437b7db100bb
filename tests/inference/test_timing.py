"""Races between calls, on a clock that only they move on."""

import pytest

from tscnc_hf.inference import timing


@pytest.fixture
def take(monkeypatch):
    """take(milliseconds, ...): a call that takes so long, one after another; `count` says how often it was made."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def make(*durations):
        def call():
            now[0] += durations[min(call.count, len(durations) - 1)] / 1e3
            call.count += 1

        call.count = 0
        return call

    return make


def test_a_race_spends_its_time_on_those_that_are_close(take):
    calls = {"best": take(10), "close": take(10.5), "behind": take(14), "far": take(100)}
    times = timing.race(calls, dict.fromkeys(calls), seconds=1)
    assert times == pytest.approx({"best": 10, "close": 10.5, "behind": 14, "far": 100})
    assert calls["far"].count == calls["behind"].count == 3  # one call of each does not count
    assert calls["best"].count == calls["close"].count > 30


def test_the_fastest_of_each_kind_stays_unless_another_kind_is_twice_as_fast(take):
    calls = {"a": take(10), "b": take(18), "b, slower": take(30), "c": take(21)}
    timing.race(calls, {"a": 1, "b": 2, "b, slower": 2, "c": 3}, seconds=1)
    assert calls["b"].count == calls["a"].count > 30
    assert calls["b, slower"].count == calls["c"].count == 3


def test_a_race_compares_within_turns(take):
    """While the machine is busy, which it is for one of them in one turn less."""
    calls = {"better": take(500, 15), "lucky": take(16.5, 16.5, 16.5, 11, 16.5)}
    times = timing.race(calls, dict.fromkeys(calls), seconds=0.2)
    assert times == pytest.approx({"better": 11, "lucky": 12.1})


def test_a_race_of_bursts_leaves_out_what_the_one_before_disturbs(take):
    """As a call does that begins while the threads of another spin: only the first one of its turn takes longer."""
    calls = {"disturbed": take(14, *[14, 10] * 20), "steady": take(11)}
    times = timing.race(calls, dict.fromkeys(calls), seconds=0.2, burst=0.001)
    assert times == pytest.approx({"disturbed": 10, "steady": 11})


def test_what_leaves_a_race_early_is_not_judged_by_its_worst_turn(take):
    calls = {"best": take(10), "dense": take(500, 190, 19), "other": take(30)}
    times = timing.race(calls, {"best": 1, "dense": 2, "other": 2}, seconds=0.2)
    assert times["dense"] == pytest.approx(19)


def test_one_bad_turn_does_not_end_a_race(take):
    calls = {"steady": take(10), "disturbed": take(9, 13, 9)}
    times = timing.race(calls, dict.fromkeys(calls), seconds=0.2)
    assert times == pytest.approx({"steady": 10, "disturbed": 9}) and calls["disturbed"].count > 6


def test_a_call_without_rivals_is_made_a_few_times(take):
    alone = take(1)
    assert timing.race({"alone": alone}, {"alone": None}, seconds=100) == pytest.approx({"alone": 1})
    assert alone.count == 6


def test_a_race_ends_though_calls_take_no_time(take):
    calls = {"a": take(0), "b": take(0)}
    assert timing.race(calls, dict.fromkeys(calls), seconds=1) == {"a": 0, "b": 0}
