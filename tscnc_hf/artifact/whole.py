"""Plain copies of models that FSDP2 has sharded over processes: what is saved, published and tested."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from tscnc_hf.artifact.narrowed import as_plain, narrowed
from tscnc_hf.method.sharding import whole_state


def unsharded_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class that a model had before `fully_shard` put one in its place, derived from that and from FSDPModule."""
    from torch.distributed.fsdp import FSDPModule

    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))


def whole_copy(model: PreTrainedModel, keep: bool = True) -> PreTrainedModel | None:
    """
    A sharded model as a plain one, in eval mode on the CPU. All processes call it; those that do not `keep` only help
    to gather the weights, and get None.
    """
    state = whole_state(model, keep)
    if state is None:
        return None
    model_class = unsharded_class(model)
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and at once replaced
        whole = narrowed(model_class, model.config)(copy.deepcopy(model.config))
    as_plain(whole)
    whole.load_state_dict(state)
    return whole.eval()
