"""How a card writes things: numbers, percentages, sizes, attacks, paths, names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


# an absolute path, POSIX or Windows; not the slash of 8/255, of a URL, of a relative path or of a closing tag
ABSOLUTE_PATH = re.compile(r"(?<![\w.<:/\\])(?:file://|~|[A-Za-z]:)?[/\\](?:[^\s\"'/\\]+[/\\]+)*([^\s\"'/\\]+)")


def is_hub_id(name: str | None) -> bool:
    """Whether `name` can be "user/name" on the Hub, and is no folder here."""
    try:
        validate_repo_id(name)
    except (HFValidationError, TypeError):
        return False
    return "/" in str(name) and not Path(str(name)).exists()


def without_paths(text: str) -> str:
    """`text` with every absolute path cut down to its last part: a card says nothing of the machine that wrote it."""
    return ABSOLUTE_PATH.sub(r"\1", text)


def one_line(text: Any) -> str:
    """A text of somebody else's, such as the name of a class, without line breaks."""
    return " ".join(str(text).split())


def table_cell(text: Any) -> str:
    """Such a text as a cell of a Markdown table."""
    return one_line(text).replace("|", "\\|")


def class_name(label: int, names: Sequence[str] | Mapping[int, str] | None = None) -> str:
    """The name of a class; its number where it has none, as an output beyond the classes of a data set."""
    known = names if isinstance(names, Mapping) else dict(enumerate(names or ()))
    return str(known.get(label, label))


def plain(value: Any) -> Any:
    """YAML's own types, without absolute paths."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, bool | int | float) else without_paths(str(getattr(value, "value", value)))


def attack_label(name: str) -> str:
    """ "pgd-20" -> "PGD-20"; a name of words stays as it is."""
    return {"autoattack": "AutoAttack"}.get(name, name.upper() if re.match(r"a?pgd|fgsm|cw\b|fab", name) else name)


def resize_text(resize: Mapping[str, Any]) -> str:
    """`Resize.to_dict()` as words: "128x128 (nearest)"."""
    height, width = resize["crop"][2:] if resize.get("crop") else (resize["height"], resize["width"])
    cut = f", cut from {resize['height']}x{resize['width']}" if resize.get("crop") else ""
    return f"{height}x{width} ({resize['interpolation']}{cut})"


def settings_text(parameters: Mapping[str, Any]) -> str:
    """The parameters of an attack as words: "steps 20, step size 0.0125 (3.19/255), random start yes"."""
    words = []
    for key, value in parameters.items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif key in ("step_size", "epsilon"):
            value = format_pixels(value)
        words.append(f"{key.replace('_', ' ')} {value}")
    return ", ".join(words)


def used_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that had an effect, given the others: no attack steps of a one-step attack, no ridge of no CNC."""
    objective, adversary = config.get("objective"), config.get("adversary")
    clean = objective == "natural" or adversary == "none"
    without_effect = {  # beginnings of options, where one of them is off
        ("adversary", "attack_step", "epsilon_warmup", "natural_fraction", "awp_", "fold_batch_norm"): clean,
        ("attack_steps",): adversary in ("fgsm-rs", "n-fgsm", "mixed"),
        ("trades_beta",): objective not in ("trades", "mart", None),
        ("awp_",): not config.get("awp_gamma", True),
        ("tsc_a",): not config.get("tsc_weight", True),
        ("regrow_",): not (config.get("target_sparsity", True) and config.get("regrow_fraction", True)),
        ("teacher", "distill_"): not config.get("distill_weight", True),
        ("gate_",): config.get("tsc_on", "gates") != "gates",
        ("cnc_form", "cnc_ridge", "cnc_interval"): not config.get("cnc_weight", True),
        tuple(key for key in config if key.startswith("pruning_") and key != "pruning_exclude"): (
            not config.get("target_sparsity", True)
        ),
    }
    off = tuple(start for starts, is_off in without_effect.items() if is_off for start in starts)
    return {key: value for key, value in config.items() if not key.startswith(off)}


def collapse_text(
    found: Mapping, emptied: Sequence[str] = (), class_names: Sequence[str] | Mapping | None = None
) -> str:
    """What a collapsed network is, in a sentence; `found` as results have it, `emptied` are weights that are zero."""
    if found.get("constant"):
        said = "it gives the same logits for every image"
    else:
        label = found["class"]
        name = class_name(label, class_names)
        known = name not in (str(label), f"LABEL_{label}")
        said = f"it names class {label}{f' ({name})' if known else ''} for {found['share']:.1%} of the images"
    if found.get("largest_class") is not None:
        said += f", of which {found['largest_class']:.1%} belong to the largest class"
    text = f"the network has collapsed: {said}. Its accuracies are no sign of robustness"
    if not emptied:
        return text
    rest = f" and {len(emptied) - 3} more" if len(emptied) > 3 else ""
    return f"{text}. Weights that are zero throughout: {', '.join(emptied[:3])}{rest}"


def without_tokens(command: str) -> str:
    """A command without options whose names end in "token", and with no token of the Hub left: cards are published."""
    command = re.sub(r" --\w*token(=| )('[^']*'|\S+)", "", command)
    return re.sub(r"\bhf_[A-Za-z0-9]{6,}", "hf_...", command)


def wrapped_command(command: str, width: int = 100) -> str:
    """A long command over several lines, one option each, which a shell takes as it is."""
    return command if len(command) <= width else re.sub(r" (?=--\w)", " \\\\\n    ", command)


def format_pixels(value: float | str) -> str:
    """A pixel quantity in [0, 1] units and in steps of 1/255; a text such as "8/255" as it is."""
    return f"{value:.4g} ({255 * value:.3g}/255)" if isinstance(value, int | float) else str(value)


def format_bytes(count: int) -> str:
    """Bytes for people, in powers of 1000, as the Hub shows them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} bytes"


def number(value: Any) -> float:
    """A float of a JSON figure: "inf" and "nan" are read as such, None as nan."""
    return math.nan if value is None else float(value)


def format_number(value: Any, digits: str = ".4g") -> str:
    """A JSON figure that may be "inf", "-inf", "nan" or None: "∞", "-∞" or "n/a" then, and else as `digits` says."""
    value = number(value)
    if math.isnan(value):
        return "n/a"
    return f"{value:{digits}}" if math.isfinite(value) else "∞" if value > 0 else "-∞"


def format_kappa(value: Any) -> str:
    """A condition number for people: three significant digits, "∞" when infinite, "n/a" when undefined."""
    value = number(value)
    if math.isfinite(value) and value >= 1e6:
        return re.sub(r"e\+0*", "e", f"{value:.3g}")
    return format_number(value, ",.0f" if value >= 100 else ".3g")


def format_percent(fraction: Any) -> str:
    """A fraction as a percentage; digits are added before "100" or "0" would be a lie."""
    fraction = number(fraction)
    if math.isnan(fraction):
        return "n/a"
    for digits in (1, 2, 3, 4):
        text = f"{100 * fraction:.{digits}f}"
        if float(text) not in (0.0, 100.0) or fraction in (0.0, 1.0):
            break
    return f"{text} %"


def by_layer(spectrum: Mapping[str, Any] | None) -> dict[str, list[Mapping[str, Any]]]:
    """Spectrum rows of each layer, in order; a fused or grouped layer has several, named "qkv[0]", "qkv[1]", ..."""
    layers: dict[str, list[Mapping[str, Any]]] = {}
    for row in (spectrum or {}).get("rows", ()):
        layers.setdefault(re.sub(r"\[\d+\]$", "", row["name"]), []).append(row)
    return layers
