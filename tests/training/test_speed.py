"""What the log says of how fast training is."""

import pytest
import torch

from tscnc_hf.training.speed import STEPS, Speed
from tscnc_hf.training.trainer import TSCNCTrainer


SHARES = ("share_attack", "share_constraints", "share_masks", "share_rest")
OPTIONS = {"max_steps": 4, "logging_steps": 2, "tsc_weight": 1e-6, "pruning_interval": 1, "save_strategy": "no"}


def trained(model, data, config) -> TSCNCTrainer:
    network, processor = model
    trainer = TSCNCTrainer(network, config, train_dataset=data, processing_class=processor)
    trainer.train()
    return trainer


def test_it_is_logged_where_it_is_asked_for(make_config, tiny_resnet, digits):
    config = make_config(**OPTIONS, log_speed=True)
    logs = [entry for entry in trained(tiny_resnet, digits.train, config).state.log_history if "loss" in entry]
    assert len(logs) == 2 and "log_speed" not in config.method_dict()
    for entry in logs:
        assert sum(entry[name] for name in SHARES) == pytest.approx(1, abs=2e-3)
        assert all(entry[name] > 0 for name in SHARES) and entry["images_per_second"] > 0
    assert logs[0]["seconds_left"] > 0 and logs[1]["seconds_left"] == 0
    config = make_config(**OPTIONS)
    assert not any(name in entry for entry in trained(tiny_resnet, digits.train, config).state.log_history
                   for name in (*SHARES, "images_per_second", "seconds_left"))  # fmt: skip


def test_on_a_gpu_steps_are_measured_by_events(monkeypatch):
    """An event has a time once the device has come to it: nothing waits for one before the log."""
    clock, waits = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, other):  # milliseconds
            waits.append(1)
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    speed = Speed(torch.device("cuda"), on=True)
    speed.begin(10)
    for _ in range(2):
        speed.start_step()
        for name, seconds in (("attack", 5), ("constraints", 1), ("attack", 1), ("masks", 0.5)):
            with speed.part(name):
                clock[0] += seconds
        clock[0] += 2.5
        speed.end_step(64)
        assert waits == []
    found = speed.figures(12, 20)
    assert [found[name] for name in SHARES] == [0.6, 0.1, 0.05, 0.25]
    assert speed.figures(12, 20) == {}  # nothing since


def test_evaluations_and_checkpoints_are_no_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tscnc_hf.training.speed.time.perf_counter", lambda: now[0])
    speed = Speed(torch.device("cpu"), on=True)
    speed.begin(0)
    for _ in range(2):
        speed.start_step()
        now[0] += 4
        speed.end_step(32)
    with speed.aside():
        now[0] += 100
    found = speed.figures(2, 6)
    assert found["images_per_second"] == 8 and found["seconds_left"] == 216  # of a run with as many of them


def test_what_is_done_in_one_step_of_ten_has_its_share_of_ten(monkeypatch):
    """Though each log comes after such a step; and one in an evaluation has none."""
    now = [0.0]
    monkeypatch.setattr("tscnc_hf.training.speed.time.perf_counter", lambda: now[0])
    speed = Speed(torch.device("cpu"), on=True)

    def spend(name: str, seconds: float) -> None:
        with speed.part(name):
            now[0] += seconds

    for _ in range(2):
        for step in range(10):
            speed.start_step()
            spend("attack", 1)
            if step == 9:
                spend("masks", 10)
            speed.end_step(1)
            with speed.aside():
                spend("attack", 1000)
        found = speed.figures(10, 20)
        assert [found[name] for name in SHARES] == [0.5, 0, 0.5, 0] and found["images_per_second"] == 0.5


def test_what_is_never_logged_does_not_grow():
    speed = Speed(torch.device("cpu"), on=True)
    for _ in range(STEPS + 5):
        speed.start_step()
        speed.end_step(1)
    assert len(speed._steps) == STEPS
