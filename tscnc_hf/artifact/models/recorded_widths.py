"""Models that are narrower than their config can say: the widths that `config.tscnc["slim"]` records, and building by
them. Everything here is plain numbers; nothing of a downloaded config is run."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from tscnc_hf.method.units.widths import Widths, set_widths_


KEY = "slim"
NOTE = (
    "Layers of this model are narrower than the other fields of this config say; their widths are recorded here. Load "
    "it with tscnc_hf.load_slim (dense weights) or tscnc_hf.load_sparse (packed weights). transformers alone stops at "
    "weights of another size."
)


def recorded_widths(config: Any) -> Widths:
    """The widths that a config records, empty where its own fields say it all.

    Raises:
        ValueError: a record of another form.
    """
    record = (getattr(config, "tscnc", None) or {}).get(KEY) or {}
    widths = record.get("widths", {}) if isinstance(record, dict) else None
    if not isinstance(widths, dict) or not all(isinstance(new, dict) for new in widths.values()):
        raise ValueError(f"config.tscnc[{KEY!r}] must hold widths, {{layer: {{attribute: number}}}}; it is {record!r}")
    return widths


def width_record(config: Any) -> dict[str, Any]:
    """What `config.tscnc` must keep whatever else is written into it: the record of widths, if there is one."""
    return {KEY: config.tscnc[KEY]} if recorded_widths(config) else {}


def record_widths_(config: Any, widths: Widths) -> None:
    """Write the widths into `config.tscnc`, or take an earlier record out where there are none."""
    rest = {key: value for key, value in (getattr(config, "tscnc", None) or {}).items() if key != KEY}
    record = {KEY: {"note": NOTE, "widths": widths}} if widths else {}
    if rest or record or hasattr(config, "tscnc"):
        config.tscnc = rest | record


def narrowed(model_class: type[PreTrainedModel], config: Any) -> type[PreTrainedModel]:
    """The class itself, or one like it whose new models have the widths that the config records. Its models are to be
    given back their class: `as_plain`."""
    widths = recorded_widths(config)
    if not widths or hasattr(model_class, "_plain_class"):
        return model_class

    def __init__(self, config, *args, **kwargs):
        model_class.__init__(self, config, *args, **kwargs)
        set_widths_(self, widths)

    members = {"__init__": __init__, "__module__": model_class.__module__, "_plain_class": model_class}
    return type(model_class.__name__, (model_class,), members)


def as_plain(model: PreTrainedModel) -> PreTrainedModel:
    """The model, of the class that the user knows."""
    model.__class__ = getattr(type(model), "_plain_class", type(model))
    return model
