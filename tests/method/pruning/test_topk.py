"""The exact top k of many scores, beside a full sort."""

import pytest
import torch

from tscnc_hf.method.pruning import topk
from tscnc_hf.method.pruning.topk import keep_largest


def by_sorting(scores: list[torch.Tensor], pruned: int) -> torch.Tensor:
    """Kept, flat; among equal scores the first ones are kept."""
    flat = torch.cat([score.reshape(-1) for score in scores])
    keep = torch.zeros(len(flat), dtype=torch.bool)
    keep[flat.sort(descending=True, stable=True).indices[: len(flat) - pruned]] = True
    return keep


def flat(masks: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([mask.reshape(-1) for mask in masks])


DRAWS = {
    "normal": lambda n: torch.randn(n).abs(),
    "signed": lambda n: torch.randn(n),
    "few values": lambda n: torch.randint(0, 4, (n,)).float(),
    "mostly zero": lambda n: torch.randn(n) * (torch.rand(n) < 0.05),
    "all equal": lambda n: torch.full((n,), 0.25),
    "sorted": lambda n: torch.arange(n).float(),  # every n-th of them is no random sample
    "heavy tails": lambda n: torch.randn(n).pow(9),
    "infinite": lambda n: torch.randn(n).masked_fill(torch.rand(n) < 0.3, torch.inf).masked_fill(
        torch.rand(n) < 0.3, -torch.inf
    ),
    "both zeros": lambda n: torch.randn(n).sign() * 0.0,
}  # fmt: skip


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.9, 0.99, 1.0])
def test_as_a_sort_says(draw, share, monkeypatch):
    monkeypatch.setattr(topk, "SAMPLE", 500)  # so that the sample is a small part of the scores
    monkeypatch.setattr(topk, "CHUNK", 777)
    scores = [DRAWS[draw](n).reshape(shape) for n, shape in ((6000, (60, 100)), (3000, (-1,)), (64, (4, 4, 2, 2)))]
    pruned = round(share * 9064)
    masks = keep_largest(scores, pruned)
    assert [mask.shape for mask in masks] == [score.shape for score in scores]
    assert int((~flat(masks)).sum()) == pruned
    assert torch.equal(flat(masks), by_sorting(scores, pruned))


@pytest.mark.parametrize("pruned", range(8))
def test_every_count_of_a_handful(pruned):
    scores = [torch.tensor([1.0, 0.0, 1.0]), torch.tensor([[1.0, 0.0], [2.0, 1.0]])]
    assert torch.equal(flat(keep_largest(scores, pruned)), by_sorting(scores, pruned))


def test_bfloat16_and_channels_last():
    scores = [torch.randn(64, 16, 3, 3).bfloat16().to(memory_format=torch.channels_last), torch.randn(50).bfloat16()]
    for pruned in (100, 5000, 9000):
        assert torch.equal(flat(keep_largest(scores, pruned)), by_sorting(scores, pruned))


def test_what_is_not_a_number_is_an_error():
    with pytest.raises(ValueError, match="NaN"):
        keep_largest([torch.tensor([1.0, float("nan"), 2.0])], 1)
