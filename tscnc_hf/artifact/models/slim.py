"""Smaller dense models that save and load like any other: slimming, and what becomes of the config."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TimmWrapperConfig

from tscnc_hf.artifact.models.recorded_widths import record_widths_
from tscnc_hf.method.units.groups import KINDS
from tscnc_hf.method.units.sites import HEAD_COUNTS
from tscnc_hf.method.units.slimming import SlimReport, cut_dead_units
from tscnc_hf.method.units.widths import Widths, changed_widths, layer_widths


def slim(
    model: nn.Module,
    example_inputs: Tensor | None = None,
    *,
    multiple_of: int = 1,
    uniform: bool = False,
    kinds: Sequence[str] = KINDS,
) -> tuple[nn.Module, SlimReport]:
    """
    Cut dead channels, hidden units and attention heads out for good: `small, report = slim(model)`.

    What is dead, what is left alone, the arguments and what they may not be (ValueError):
    `tscnc_hf.method.units.slimming.cut_dead_units`. The outputs in evaluation mode are those of the model (up to
    rounding; the report has the difference in float64).

    Of a transformers model, the config of the copy is made true as well. Where the config's own fields can say the new
    widths (`report.config == "config"`: `intermediate_size`, `num_attention_heads` and `head_dim` of a ViT;
    `mlp_ratio`, `base_width`, `block_reduce_first` among timm's `model_args`), the saved model loads everywhere.
    Otherwise (`"recorded"`) the widths of the layers are recorded in `config.tscnc["slim"]`: `load_slim` and
    `load_sparse` read them, and stock transformers stops with a size mismatch. Layers of unequal width are what most
    configs cannot say: `uniform=True` trades some of the gain for a model that loads everywhere.

    Returns:
        The smaller copy and its `SlimReport`.
    """
    slimmed, report = cut_dead_units(model, example_inputs, multiple_of, uniform, kinds)
    if isinstance(slimmed, PreTrainedModel):
        report = replace(report, config=_make_config_true_(slimmed) if report.removed else "as before")
    return slimmed, report


def _make_config_true_(model: PreTrainedModel) -> str:
    """Change the model's config so that it describes the model; how: "config" or "recorded"."""
    config = copy.deepcopy(model.config)
    record_widths_(config, {})
    wanted = layer_widths(model)
    for edits in ({}, *_candidates(config, model, wanted)):
        edited = copy.deepcopy(config)
        edited.update(edits)
        with suppress(Exception), torch.device("meta"):  # of a config that nobody wrote: it describes no model then
            if layer_widths(type(model)(edited)) == wanted:
                model.config.update(edits)
                record_widths_(model.config, {})
                return "config"
    with torch.device("meta"):
        built = type(model)(config)
    record_widths_(model.config, changed_widths(built, model))
    return "recorded"


def _candidates(config: Any, model: PreTrainedModel, widths: Widths) -> Iterator[dict[str, Any]]:
    """Changes of a config that may describe the widths; whether one does is seen by building the model."""
    hidden = _inputs(widths, ("fc2", "output.dense"))
    if isinstance(config, TimmWrapperConfig):
        for arguments in _timm_candidates(model, widths, hidden):
            yield {"model_args": (config.model_args or {}) | arguments}
        return
    heads = {count for new in widths.values() for key, count in new.items() if key in HEAD_COUNTS}
    edits: dict[str, Any] = {}
    if len(hidden) == 1 and hasattr(config, "intermediate_size"):
        edits["intermediate_size"] = hidden.pop()
    if len(heads) == 1 and type(getattr(config, "num_attention_heads", None)) is int:  # not a list, one a stage
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        edits |= {"num_attention_heads": heads.pop(), "head_dim": size}
    if edits:
        yield edits


def _inputs(widths: Widths, ends: str | tuple[str, ...]) -> set[int]:
    """How many inputs the layers have whose names end so: linear layers, or convolutions in their place."""
    found = [new for name, new in widths.items() if name.endswith(ends)]
    return {new[key] for new in found for key in ("in_features", "in_channels") if key in new}


def _timm_candidates(model: PreTrainedModel, widths: Widths, hidden: set[int]) -> Iterator[dict[str, Any]]:
    inputs = _inputs(widths, "fc1")
    if len(hidden) == len(inputs) == 1:
        units, width = hidden.pop(), inputs.pop()
        ratio = units / width
        yield {"mlp_ratio": ratio if int(width * ratio) == units else math.nextafter(ratio, math.inf)}
    for module in model.modules():  # the first block of a ResNet
        made = [getattr(getattr(module, key, None), "out_channels", 0) for key in ("conv1", "conv2", "conv3")]
        if all(made[:2]) and hasattr(module, "bn2"):
            yield {"base_width": 64 * 4 * made[1] / made[2]} if made[2] else {"block_reduce_first": made[1] // made[0]}
            break
