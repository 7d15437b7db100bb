"""What a dataclass says of its options in its docstring: their one description, for `--help` and docs/options.md."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass


GROUP = re.compile(r"Parameters(?: that control (?P<title>[^(]*?))?(?: \((?P<note>.*)\))?:")
OPTION = re.compile(r"(\w+(?:, \w+)*) \((.*?)(, \*optional\*(?:, defaults to (.*?))?)?\): ")


@dataclass(frozen=True)
class Option:
    """`type`, `default` and `meaning` are Markdown, as written; `default` is "" where an optional one has none."""

    name: str
    type: str
    default: str
    meaning: str

    @property
    def help(self) -> str:
        """The first sentence of the meaning, as plain text."""
        return re.split(r"(?<=\.) (?=[A-Z])", self.meaning.replace("`", ""), maxsplit=1)[0]


def option_groups(described: type) -> dict[tuple[str, str], list[Option]]:
    """
    (title, note) of each group of parameters in the docstring of a class -> its options, in the docstring's order.

    Raises:
        ValueError: a parameter is not written as `name (type, *optional*, defaults to default): meaning`.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    entries = None  # of the group that is being read
    for line in inspect.getdoc(described).splitlines():
        if found := GROUP.fullmatch(line):
            entries = groups.setdefault((found["title"] or "", found["note"] or ""), [])
        elif line and not line.startswith(" "):
            entries = None
        elif line and entries is not None:
            if line.startswith(" " * 5):
                entries[-1] += " " + line.strip()
            else:
                entries.append(line.strip())
    return {group: [option for text in entries for option in _options(text)] for group, entries in groups.items()}


def _options(text: str) -> list[Option]:
    found = OPTION.match(text)
    if found is None:
        raise ValueError(f"{text!r}: write name (`type`, *optional*, defaults to `default`): meaning")
    names, kind, optional, default = found.groups()
    default = (default or "") if optional else "required"
    meaning = text[found.end() :]
    return [Option(name, kind, default, meaning[:1].upper() + meaning[1:]) for name in names.split(", ")]
