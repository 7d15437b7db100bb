"""Command line and YAML: `--config` sets defaults, the command line wins, an unknown key is an error."""

from __future__ import annotations

import sys
from argparse import Action, ArgumentParser
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from tscnc_hf.cli.options import option_groups
from tscnc_hf.cli.refusing import first_to_say


class _GivenTwice(yaml.YAMLError):
    """A map of a YAML file has a key twice."""


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose maps have each key once: of two values the last would be taken, and nobody told."""

    def construct_mapping(self, node, deep=False):
        lines: dict[str, int] = {}
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise _GivenTwice(f"{key.value} is given in line {lines[key.value]} and in line {line}; keep one")
            lines[key.value] = line
        return super().construct_mapping(node, deep)


# a date is a text like any other: no option takes one
_UniqueKeys.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)


class ConfigParser(HfArgumentParser):
    """
    `HfArgumentParser` with `--config FILE.yaml`, which may be given several times: later files win.

    A key of the file is the name of an option; its value becomes the option's default and is converted like one typed
    on the command line (YAML reads `5e-5` as a string). Options that the dataclasses require may come from either.
    `--help` shows the first sentence of what a dataclass's docstring says of an option.
    """

    def __init__(self, dataclass_types, **kwargs):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        hints = chain.from_iterable(get_type_hints(one).items() for one in self.dataclass_types)
        self._allowed = {name: _kinds(hint) for name, hint in hints}
        self._json = {action.dest for action in self._actions if _is_json(action.default)}
        described = chain.from_iterable(chain(*option_groups(one).values()) for one in self.dataclass_types)
        texts = {option.name: option.help.replace("%", "%%") for option in described}
        for action in self._actions:
            action.help = texts.get(action.dest, action.help)
        self.add_argument(
            "--config",
            metavar="FILE.yaml",
            help="YAML file with defaults; of several the later win, and the command line over all.",
        )

    def parse(self, args: Sequence[str] | None = None) -> tuple:
        """One instance per dataclass. Ends with exit code 2 and a message on unknown options, keys or wrong values."""
        args = list(sys.argv[1:] if args is None else args)
        for path in _config_paths(args):
            self._apply_yaml(Path(path))
        try:
            *instances, _, unknown = self.parse_args_into_dataclasses(
                args, look_for_args_file=False, return_remaining_strings=True
            )
        except ValueError as error:  # raised by a dataclass's own checks
            self.exit(2, f"{self.prog}: error: {error}\n")
        if unknown:
            self.exit(2, f"{self.prog}: error: {self._about_unknown(unknown)}\n")
        return tuple(instances)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        super().exit(status, message if message and first_to_say(message) else None)

    def error(self, message: str) -> NoReturn:
        if not first_to_say(message):
            self.exit(2)
        super().error(message)

    def _about_unknown(self, words: Sequence[str]) -> str:
        """What is said of words that no option takes: options by name, with those that look alike, or values."""
        names = [word.split("=", 1)[0] for word in words if word.startswith("--")]
        alike = [get_close_matches(name, self._option_string_actions, n=1) for name in names]
        shown = [f"{name} (perhaps {near[0]})" if near else name for name, near in zip(names, alike, strict=True)]
        problem = f"unknown option(s) {', '.join(shown)}" if names else f"{', '.join(words)}: no option before it"
        return f"{problem}; `--help` lists those that exist"

    def _apply_yaml(self, path: Path) -> None:
        if not path.is_file():
            self.error(f"--config {path}: no such file")
        try:
            values, written = _read_yaml(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            self.error(f"--config {path} is not text in UTF-8 ({error}): save it in that encoding")
        except _GivenTwice as error:
            self.error(f"--config {path}: {error}")
        except yaml.YAMLError as error:
            self.error(f"--config {path} is not valid YAML: {error}")
        if not isinstance(values, dict):
            self.error(f"--config {path}: expected `option: value` lines, got a {type(values).__name__}")
        actions = {action.dest: action for action in self._actions if action.dest not in ("help", "config")}
        unknown = sorted(map(str, set(values) - set(actions)))
        if unknown:
            self.error(f"--config {path}: unknown option(s) {', '.join(unknown)}; `--help` lists those that exist")
        for name, value in values.items():
            action = actions[name]
            if problem := self._problem(action, value):
                self.error(f"--config {path}: {name}{problem}")
            action.required = False
            self.set_defaults(**{name: self._default(path, action, value, written.get(name))})

    def _problem(self, action: Action, value: Any) -> str | None:
        """What is wrong with a value of a file, behind the option's name; None where its own type is to say it."""
        allowed, said = self._allowed.get(action.dest, set()), f"={value!r}; "
        is_json = action.dest in self._json
        if action.nargs == "+" and isinstance(value, str) and not isinstance(action.default, str):
            return f"{said}give a list, [{value}]"  # else one of its letters
        if action.nargs == "+" and action.type is str and value is not None and not _is_list_of_texts(_listed(value)):
            return f"{said}give a list of texts, in quotes where need be"
        if value is None and action.nargs == "+" and None not in allowed:
            return " has no value; give a list, [] for none"
        if value is None and isinstance(action.default, bool):
            return " has no value; give true or false"
        if value is None and action.type is str and action.nargs is None and None not in allowed and not is_json:
            return " has no value; give a text, or leave the line out"
        if isinstance(value, list | dict) and action.nargs is None:
            kind = dict if isinstance(value, dict) else list
            if action.type is str and (kind not in allowed) and not is_json:
                return f"{said}give one text"
            if action.type is not str:
                return f"{said}give one value"
        items = value if isinstance(value, list) else [value]
        if action.type in (int, float) and any(isinstance(item, bool) for item in items):
            return f"{said}give a number"
        return None

    def _default(self, path: Path, action: Action, value: Any, written: str | list[str] | None) -> Any:
        """A value of a file as the option's own type takes it: numbers and texts as they were written."""
        if value is False and "no" in (action.choices or ()):
            value = "no"  # YAML reads a bare `no` as false
        if action.choices is not None and value is not None and value not in action.choices:
            allowed = ", ".join(map(str, action.choices))
            self.error(f"--config {path}: {action.dest}={value!r}; use one of {allowed}")
        is_text = action.type is str and action.nargs is None
        if isinstance(value, bool) and is_text and not {dict, False} & self._allowed.get(action.dest, set()):
            return written  # a folder may be called `on`
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = written or str(value)  # a string default goes through the option's own type
        if action.nargs == "+" and value is not None:
            value = _listed(value)
        if (
            isinstance(value, list)
            and action.type in (str, int, float)
            and (action.nargs == "+" or action.type is not str)
        ):
            try:
                value = [action.type(str(item)) for item in (written if isinstance(written, list) else value)]
            except ValueError as error:
                self.error(f"--config {path}: {action.dest}={value!r}; {error}")
        return value


def _read_yaml(text: str) -> tuple[Any, dict[str, str | list[str]]]:
    """
    A file's map, and of its numbers, true and false, and of lists of scalars, how they were written: YAML reads a
    branch 1.10 as 1.1, a seed 010 as 8 and 1:30 as 90.
    """
    loader = _UniqueKeys(text)
    try:
        node = loader.get_single_node()
        values = {} if node is None else loader.construct_document(node)
    finally:
        loader.dispose()
    written = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(value, yaml.ScalarNode):
            written[key.value] = value.value
        elif isinstance(value, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in value.value):
            written[key.value] = [item.value for item in value.value]
    return {} if values is None else values, written


def _kinds(hint: Any) -> set[Any]:
    """Of an annotation of a field: list, dict, None and False where it allows them."""
    if hint is type(None):
        return {None}
    if get_origin(hint) in (list, dict):
        return {get_origin(hint)}
    if hint in (list, dict):
        return {hint}
    return {False for item in get_args(hint) if item is False} | set().union(*map(_kinds, get_args(hint)))


def _is_json(default: Any) -> bool:
    """Whether an option's text is JSON, for which a file may have a map: model_args and its like."""
    return isinstance(default, str) and (default.startswith("{") or default == "null")


def _listed(value: Any) -> Any:
    """One number stands for a list of it."""
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


def _is_list_of_texts(value: Any) -> bool:
    """Whether it is one, or a list that texts may be made of: YAML reads 3 as a number."""
    return isinstance(value, list) and all(
        isinstance(item, str | int | float) and not isinstance(item, bool) for item in value
    )


def side_or_pair(image_size: int | Sequence[int] | None) -> int | tuple[int, ...] | None:
    """An image size as typed: one number is a side, two are height and width."""
    if image_size is None or isinstance(image_size, int):
        return image_size
    return image_size[0] if len(image_size) == 1 else tuple(image_size)


def _config_paths(args: Sequence[str]) -> list[str]:
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", nargs="?", default=[])
    return [path for path in parser.parse_known_args(args)[0].config if path is not None]  # None is refused later
