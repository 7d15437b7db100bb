"""`docs/results_json.md` read as what it is: the schema of results.json."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path


PAGE = (Path(__file__).parents[1] / "docs" / "results_json.md").read_text(encoding="utf-8")
TYPES = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value),
    "boolean": lambda value: isinstance(value, bool),
    "list": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
    "null": lambda value: value is None,
    "any": lambda value: True,
}
# path -> (names of its types, whether it is in each object that may hold it)
KEYS = {
    path: (re.findall(r"\w+", types.replace(" or ", " ")), when.strip().startswith("always"))
    for path, types, when in re.findall(r"^\| `([^`]+)` \| ([^|]+) \| [^|]*\| ([^|]*) \|$", PAGE, re.MULTILINE)
}
KEYS |= {f"{path.rpartition('[].')[0]}[]": (["object"], False) for path in KEYS if "[]." in path}  # items of lists
EXAMPLE = json.loads(re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1])


def check_results(results: Mapping) -> None:
    """
    Raises:
        AssertionError: a key that the page does not have, a value of another type than it says, or one that is always
            there and is not.
    """
    results = json.loads(json.dumps(results, allow_nan=False))
    dense = results.pop("dense", None)
    found = list(_walk(results, ""))
    for path, value in found:
        known = _known(path)
        assert known is not None, f"{path} is not in docs/results_json.md"
        assert any(TYPES[name](value) for name in KEYS[known][0]), f"{path}={value!r} is no {KEYS[known][0]}"
        if isinstance(value, dict):
            for key, (_, always) in KEYS.items():
                parent, _, name = key.rpartition(".")
                if always and parent == known and name != "*" and not name.endswith("[]"):
                    assert name in value, f"{path} has no {name}"
    lacking = {key for key, (_, always) in KEYS.items() if always and "." not in key} - results.keys()
    assert not lacking, f"there is no {', '.join(sorted(lacking))}"
    if dense is not None:
        assert "dense" not in dense
        check_results(dense)


def _walk(value, path: str) -> Iterator[tuple[str, object]]:
    if path:
        yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, f"{path}.{key.replace('.', '/')}" if path else key)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item, f"{path}[]")


def _known(path: str) -> str | None:
    """The page's name of a path: itself, or one with stars; what is below a value of any type is not looked at."""
    if path in KEYS:
        return path
    parts = path.split(".")
    for key, (types, _) in KEYS.items():
        names = key.split(".")
        fits = all(name in ("*", part) for name, part in zip(names, parts, strict=False))
        if fits and (len(names) == len(parts) or (types == ["any"] and len(names) < len(parts))):
            return key
    return None
