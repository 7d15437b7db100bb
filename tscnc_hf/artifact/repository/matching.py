"""Are results those of the model beside them: of its weights, of its config, and of its image processor?"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, PreTrainedModel

from tscnc_hf.artifact.files.identity import RunIdentity
from tscnc_hf.artifact.files.network import other_part
from tscnc_hf.artifact.models.preprocessing import preprocessing
from tscnc_hf.artifact.repository.opening import read_json
from tscnc_hf.method.adversarial.pixels import Preprocessing


ADVICE = "Evaluate this model (tscnc evaluate) and give its results.json with --results"
OTHER = {
    "weights": "other weights than those in the folder",
    "network": "the same weights in another network: the config.json of the folder makes something else of them",
}
NAMED_BY = {"weights": "model", "network": "network"}  # of an identity's weights, what says so


def other_model(results: Mapping[str, Any], model: PreTrainedModel) -> str | None:
    """
    In what results are not the model's: a key of `OTHER`, or "unknown" where they do not say whose they are. None
    where they are its own.
    """
    try:
        return other_part(RunIdentity.from_dict(results.get("identity")), model)
    except ValueError:
        return "unknown"


def keep_aside(path: Path, model: PreTrainedModel) -> None:
    """Give results that are not the model's a name of their own in the folder, which no push takes along."""
    if results := read_json(path):
        other = other_model(results, model)
        if other is not None:
            said = "unknown" if other == "unknown" else results["identity"]["weights"].get(NAMED_BY[other])
            path.replace(path.with_name(f"_results-of-{re.sub(r'[^0-9a-z]', '', str(said))[:8]}.json"))


def check_results(
    results: Mapping[str, Any], model: PreTrainedModel, folder: str | os.PathLike, source: str | os.PathLike
) -> None:
    """
    A card must not show the accuracies of another model than the one beside it.

    Args:
        folder: of the model, for its image processor.
        source: of the results, for messages.

    Raises:
        ValueError: they are of other weights, of another network or of other inputs, or say nothing of it.
    """
    try:
        of = RunIdentity.from_dict(results.get("identity"))
    except ValueError:
        raise ValueError(f"{source} does not say which weights it is of. {ADVICE}") from None
    if other := other_part(of, model):
        raise ValueError(f"{source} is of {OTHER[other]}. {ADVICE}")
    if said := _other_inputs(results, of.options, model, Path(folder)):
        raise ValueError(f"{source} is of other inputs than the folder's image processor makes: {said}. {ADVICE}")


def _other_inputs(
    results: Mapping[str, Any], options: Mapping[str, Any], model: PreTrainedModel, folder: Path
) -> str | None:
    """What differs; None where nothing does, or where the folder does not say how inputs are made."""
    try:
        how = preprocessing(model, _processor(folder))
    except ValueError:
        return None
    for name, now in (("mean", how.mean), ("std", how.std)):
        if name in options and not _alike(options[name], now):
            return f"{name} {options[name]} there, {now} here"
    if "mean" in options and options.get("order") != how.order:
        return f"channels in the order {options.get('order')} there, {how.order} here"
    return _other_size(results.get("robustness") or {}, how)


def _other_size(robustness: Mapping[str, Any], how: Preprocessing) -> str | None:
    if not (size := tuple((robustness.get("image_size") or ())[1:])):
        return None
    try:
        resize = how.resize(*size)
    except ValueError:  # of such images this processor makes what no attack goes through: they were made before
        return None
    before, now = robustness.get("resized"), None if resize is None else resize.to_dict()
    # images that had no size in common were brought to the model's before, and attacked there
    if before == now or (before is None and resize.output == size):
        return None
    return f"images of {size[0]}x{size[1]} are resized by {before} there, {now} here"


def _processor(folder: Path) -> object | None:
    try:
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError):  # without one the config has to say
        return None


def _alike(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two lists are the same in float32, where one number stands for all channels."""
    count = max(len(one), len(other))
    pairs = zip(*(list(values) * (count if len(values) == 1 else 1) for values in (one, other)), strict=False)
    return {len(one), len(other)} <= {1, count} and all(abs(a - b) <= 1e-6 * max(1.0, abs(a)) for a, b in pairs)
