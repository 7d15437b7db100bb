"""Options are described once: docstrings, `--help` and docs/options.md say the same."""

import ast
import runpy
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from tscnc_hf.cli.evaluate import EvaluationArguments
from tscnc_hf.cli.options import option_groups
from tscnc_hf.cli.parser import ConfigParser
from tscnc_hf.cli.recipe import DataArguments
from tscnc_hf.training.config import TSCNCConfig


DOCS = Path(__file__).parents[2] / "docs"
DESCRIBED = [TSCNCConfig, DataArguments, EvaluationArguments]


def own_fields(described: type) -> dict:
    """Those that the class itself defines, in its order."""
    found = {field.name: field for field in fields(described)}
    return {name: found[name] for name in described.__annotations__}


def described_options(described: type) -> list:
    return [option for options in option_groups(described).values() for option in options]


def test_the_page_is_up_to_date():
    made = runpy.run_path(str(DOCS / "options.py"))["options_page"]()
    assert (DOCS / "options.md").read_text(encoding="utf-8") == made, "run: python docs/options.py > docs/options.md"


@pytest.mark.parametrize("described", DESCRIBED)
def test_every_option_is_described_once_and_with_its_default(described):
    options = described_options(described)
    assert [option.name for option in options] == list(own_fields(described))  # in the same order, none twice
    for option, field in zip(options, own_fields(described).values(), strict=True):
        if option.default == "required":
            assert field.default is MISSING and field.default_factory is MISSING, option.name
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        written = ast.literal_eval(option.default.strip("`")) if option.default else default or None
        assert written == (default if option.default else None), f"{option.name}: {option.default!r}, {default!r}"


@pytest.mark.parametrize("described", DESCRIBED)
def test_no_option_is_described_a_second_time(described):
    assert [name for name, field in own_fields(described).items() if "help" in field.metadata] == []


def test_allowed_values_are_all_named():
    for described in DESCRIBED:
        for option in described_options(described):
            for choice in own_fields(described)[option.name].metadata.get("choices", ()):
                assert f'"{choice}"' in option.meaning, option.name


def test_other_defaults_than_those_of_the_trainer_are_named_as_such():
    """Those of `TrainingArguments` that are defined again have another default, or they need not be."""
    upstream = {field.name: field.default for field in fields(TrainingArguments)}
    again = {name: field.default for name, field in own_fields(TSCNCConfig).items() if name in upstream}
    assert again and all(default != upstream[name] for name, default in again.items())
    groups = {title: [option.name for option in options] for (title, _), options in option_groups(TSCNCConfig).items()}
    assert groups["the Trainer"] == list(again)


def test_help_is_the_first_sentence(capsys):
    @dataclass
    class Two:
        """
        Of no use.

        Parameters:
            first, second (`float`, *optional*, defaults to 0.5): share of `x`, e.g. 0.2, at
                100% its all. Not shown.

        Notes of the class, which are no option (`x`): none.
        """

        first: float = 0.5
        second: float = 0.5

    (group,) = option_groups(Two).values()
    assert [(one.name, one.type, one.default) for one in group] == [(name, "`float`", "0.5") for name in vars(Two())]
    parser = ConfigParser([Two])
    helped = {action.dest: parser._get_formatter()._expand_help(action) for action in parser._actions}
    assert helped["first"] == helped["second"] == "Share of x, e.g. 0.2, at 100% its all. (default: 0.5)"
    assert helped["config"].startswith("YAML file")


def test_what_cannot_be_read_is_shown():
    class Wrong:
        """
        Parameters:
            name: without a type.
        """

    with pytest.raises(ValueError, match="name: without a type.*write name"):
        option_groups(Wrong)
