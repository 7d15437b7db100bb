"""Parts of a batch, each by a thread of its own: what the threads see, and when there are none."""

import os
import threading

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tscnc_hf.inference.chunks import InChunks, _pool, torch_threads
from tscnc_hf.inference.layers import SparseLinear


class Watched(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(3, 2), []

    def forward(self, x):
        state = torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.seen.append((threading.current_thread(), len(x), *state))
        if x.isnan().any():
            raise ArithmeticError("not a number")
        return self.layer(x)


@pytest.fixture
def watched():
    model = Watched().eval()
    model.forward = InChunks(model, 4, apart=True)
    with torch_threads(3):
        yield model


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_whole_rounds_are_by_threads_and_the_rest_by_all(watched, mode):
    x = torch.randn(18, 3)
    with mode():
        y = watched(x)
        state = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    assert torch.allclose(y, watched.layer(x))
    main = threading.current_thread()
    assert sorted(entry[1:] for entry in watched.seen if entry[0] is not main) == [(4, 1, *state)] * 3
    assert [entry[1:] for entry in watched.seen if entry[0] is main] == [(6, 3, *state)]
    assert torch.get_num_threads() == 3


def test_kernels_leave_threads_of_their_own_at_one(watched):
    watched.layer = SparseLinear(nn.Linear(3, 2))
    counts = []
    watched.layer.register_forward_hook(lambda *_: counts.append(torch.get_num_threads()))
    _pool.cache_clear()  # threads that no kernel has run in yet
    with torch.no_grad():
        watched(torch.randn(12, 3))
    assert counts == [1, 1, 1]


def test_what_only_this_thread_is_in_keeps_the_others_out(watched):
    x = torch.randn(12, 3)
    with torch.no_grad():
        with FlopCounterMode(display=False) as flops:
            watched(x)
        assert flops.get_total_flops() == 2 * 12 * 3 * 2
        with torch.autocast("cpu", torch.bfloat16):
            assert watched(x).dtype == torch.bfloat16
        with torch_threads(1):
            watched(x)
    assert {entry[0] for entry in watched.seen} == {threading.current_thread()}


def test_an_error_in_a_thread_is_the_callers(watched):
    x = torch.randn(12, 3)
    x[7] = torch.nan
    with pytest.raises(ArithmeticError, match="not a number"):
        watched(x)
    assert watched(x[:4]).shape == (4, 2) and torch.get_num_threads() == 3


def test_a_forked_process_has_threads_of_its_own(watched):
    x = torch.randn(12, 3)
    with torch.no_grad():
        expected = watched(x)
        if (child := os.fork()) == 0:
            os._exit(0 if torch.equal(watched(x), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
