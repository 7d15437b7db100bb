"""What the recipes share."""

import pytest
import torch

from tscnc_hf.training.recipe import set_cpu_threads


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_one_process_under_accelerate_launch_has_all_cores(make_config, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    set_cpu_threads(make_config(), None)
    assert torch.get_num_threads() == 1  # plain python: torch's own choice stays
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    set_cpu_threads(make_config(), None)
    assert torch.get_num_threads() == 3


def test_threads_asked_for_win(make_config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    set_cpu_threads(make_config(), 2)
    assert torch.get_num_threads() == 2


def test_several_processes_keep_what_their_launcher_gave(make_config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    config = make_config()
    monkeypatch.setattr(type(config), "world_size", 2)
    set_cpu_threads(config, None)
    assert torch.get_num_threads() == 1
