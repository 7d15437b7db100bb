"""Threads on a CPU: who decides."""

import pytest
import torch

from tscnc_hf.cli.threads import set_cpu_threads


CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_one_process_under_accelerate_launch_has_all_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    set_cpu_threads(CPU, 1, None)
    assert torch.get_num_threads() == 1  # plain python: torch's own choice stays
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    set_cpu_threads(torch.device("meta"), 1, None)
    assert torch.get_num_threads() == 1
    set_cpu_threads(CPU, 1, None)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("processes", [1, 2])
def test_threads_asked_for_win(processes, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    set_cpu_threads(CPU, processes, 2)
    assert torch.get_num_threads() == 2


def test_several_processes_keep_what_their_launcher_gave(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    set_cpu_threads(CPU, 2, None)
    assert torch.get_num_threads() == 1
