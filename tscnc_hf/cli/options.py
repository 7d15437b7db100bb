"""
What a dataclass says of its options in its docstring: their one description, for `--help` and for docs/options.md.

    python -m tscnc_hf.cli.options > docs/options.md
"""

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
    return [Option(name, kind, default, _capital(text[found.end() :])) for name in names.split(", ")]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def options_page() -> str:
    """docs/options.md."""
    from tscnc_hf.cli.evaluate import EvaluationArguments
    from tscnc_hf.cli.recipe import DataArguments
    from tscnc_hf.training.config import TSCNCConfig

    page = PAGE
    for heading, about, described in (
        ("Training", TRAINING, TSCNCConfig),
        ("Recipes", RECIPES, DataArguments),
        ("Evaluation", EVALUATION, EvaluationArguments),
    ):
        page += f"\n## {heading}\n\n{about}\n"
        for (title, note), options in option_groups(described).items():
            page += f"\n### {_capital(title)}\n" if title else ""
            page += f"\n{_capital(note)}.\n" if note else ""
            page += "\n| Option | Meaning | Type | Default |\n|---|---|---|---|\n"
            page += "".join(f"| `{one.name}` | {one.meaning} | {one.type} | {one.default} |\n" for one in options)
    return page


PAGE = """\
<!-- Written by `python -m tscnc_hf.cli.options > docs/options.md` from the docstrings; edit those. -->

# Options

Every option is a field of a dataclass, a key of a YAML file given with `--config`, and `--name` on the command line,
which wins over the file. An unknown option, or a value that cannot be used, is refused before anything is trained.
"""
TRAINING = """\
Fields of `TSCNCConfig`, beside those of
[`TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments)."""
RECIPES = "Options of every training recipe, beside those above. `--help` of a recipe also names those of its model."
EVALUATION = "Options of `tscnc evaluate`."


if __name__ == "__main__":
    print(options_page(), end="")
