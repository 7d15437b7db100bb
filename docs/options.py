"""
Writes docs/options.md from the docstrings of the options.

    python docs/options.py > docs/options.md
"""

from tscnc_hf.cli.evaluate import EvaluationArguments
from tscnc_hf.cli.options import option_groups
from tscnc_hf.cli.recipe import DataArguments
from tscnc_hf.training.config import TSCNCConfig


PAGE = """\
<!-- Written by `python docs/options.py > docs/options.md` from the docstrings; edit those. -->

# Options

Every option is a field of a dataclass, a key of a YAML file given with `--config`, and `--name` on the command line,
which wins over the file. An unknown option, or a value that cannot be used, is refused before anything is trained.
"""
TRAINING = """\
Fields of `TSCNCConfig`, beside those of
[`TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments)."""
RECIPES = "Options of every training recipe, beside those above. `--help` of a recipe also names those of its model."
EVALUATION = "Options of `tscnc evaluate`."


def options_page() -> str:
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


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


if __name__ == "__main__":
    print(options_page(), end="")
