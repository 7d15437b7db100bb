"""Every block of Python and shell of README.md and docs/ runs; of those that say why not, what can be checked is."""

import ast
import glob
import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from tests.docs.pages import EXEMPTION, ROOT, Block, blocks, pages, tracked
from tests.processes import run_command, run_python
from tscnc_hf.cli import main as tscnc


PYTHON, SHELL = ("python",), ("bash", "sh", "shell")
TO_READ = ("", "text", "console", "yaml", "json", "toml", "bibtex", "markdown", "{eval-rst}")
BIN = Path(sys.executable).parent
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
OFFLINE |= {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}


def of_languages(languages: tuple[str, ...], run: bool, page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language in languages and (block.reason is None) == run]


# on these, networks are trained and tested as a user would, several processes start, or all figures are drawn
WHOLE_RUNS = ("README.md", "docs/quickstart.md", "docs/hub.md", "docs/distributed.md", "docs/results.md")


def pages_to_run(languages: tuple[str, ...]) -> list:
    return [
        pytest.param(page, marks=[pytest.mark.launched] if page in WHOLE_RUNS else [])
        for page in pages()
        if of_languages(languages, run=True, page=page)
    ]


def program(page: str, languages: tuple[str, ...]) -> str:
    """The blocks of a page that run, one after the other, each line where it is on the page: errors then say where."""
    lines: list[str] = []
    for block in of_languages(languages, run=True, page=page):
        lines += [""] * (block.line - len(lines)) + block.code.splitlines()
    return "\n".join(lines) + "\n"


# ---- blocks that run ----


@pytest.mark.parametrize("page", pages_to_run(PYTHON))
def test_python_runs(page, tmp_path):
    """From top to bottom, as a reader would paste it, in a folder where nothing is but the shelf."""
    script, folder = tmp_path / Path(page).with_suffix(".py").name, tmp_path / "empty"
    script.write_text(program(page, PYTHON), encoding="utf-8")
    shutil.copytree(ROOT / "recipes" / "models", folder / "recipes" / "models")
    run_python([script], cwd=folder, environment=OFFLINE)


@pytest.mark.parametrize("page", pages_to_run(SHELL))
def test_shell_runs(page, tmp_path):
    """From top to bottom in a clone; `make` has what it would install."""
    clone, script = tmp_path / "clone", tmp_path / Path(page).with_suffix(".sh").name
    for path in tracked():
        (clone / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, clone / path)
    (clone / ".installed").touch()
    script.write_text(program(page, SHELL), encoding="utf-8")
    environment = os.environ | OFFLINE | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(clone)}
    environment["MAKEFLAGS"] = f"BIN={BIN} STAMP=.installed"
    run_command(["bash", "-ex", script], cwd=clone, env=environment, stdin=subprocess.DEVNULL)


# ---- blocks that do not ----


@pytest.mark.parametrize("page", pages())
def test_it_is_said_why_a_block_is_not_run(page):
    text, found = (ROOT / page).read_text(encoding="utf-8"), blocks(page)
    for block in found:
        assert block.language in (*PYTHON, *SHELL, *TO_READ), f"{block}: unknown language {block.language!r}"
        if block.reason is not None:
            assert block.language in (*PYTHON, *SHELL), f"{block}: {block.language!r} is never run"
            assert len(block.reason.split()) >= 3, f"{block}: say why it is not run"
    exempted = [block for block in found if block.reason is not None]
    assert len(EXEMPTION.findall(text)) == len(exempted), f"{page}: a comment 'not run' with no block after it"


@pytest.mark.parametrize("page", pages())
def test_python_that_is_not_run_compiles_and_its_imports_are_there(page):
    for block in of_languages(PYTHON, run=False, page=page):
        for node in ast.walk(ast.parse(block.code, str(block))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{block}: {node.module} has no {alias.name}"


@pytest.mark.parametrize("page", pages())
def test_shell_that_is_not_run_names_what_is_there(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for block in of_languages(SHELL, run=False, page=page):
        subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)
        for words in commands(block.code):
            try:
                check_command(words, monkeypatch)
            except (SystemExit, AssertionError) as error:
                pytest.fail(f"{block}: {shlex.join(words)}: {error} {capsys.readouterr().err}")


def commands(code: str) -> Iterator[list[str]]:
    """Simple commands, without the variables set before them and without redirections; patterns are expanded."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";|&()"):
                words = words[: next((i for i, one in enumerate(words) if set(one) <= set("<>&")), None)]
                while words and re.match(r"\w+=", words[0]):
                    del words[0]
                if words:
                    yield [found for one in words for found in sorted(glob.glob(one)) or [one]]
                words = []
            else:
                words.append(word)


def check_command(words: list[str], monkeypatch) -> None:
    """AssertionError or SystemExit where a file, a target, a module or an option does not exist."""
    for word in words:
        if re.match(r"(recipes|tests|docs|tscnc_hf|\.ci)/", word):
            assert Path(word.split("::")[0]).exists(), f"{word} does not exist"
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", Path("Makefile").read_text(), re.MULTILINE)
        unknown = [word for word in words[1:] if "=" not in word and not word.startswith("-") and word not in targets]
        assert not unknown, f"no target {unknown} in the Makefile"
    elif words[0] == "tscnc":
        check_tscnc(words[1:], monkeypatch)
    elif words[0] in ("accelerate", "torchrun") or words[0].startswith("python"):
        for position, word in enumerate(words):
            if word == "-m":
                module, *arguments = words[position + 1 :]
                assert importlib.util.find_spec(module), f"no module {module}"
                if module == "tscnc_hf.cli":
                    check_tscnc(arguments, monkeypatch)
                return
            if re.fullmatch(r"recipes/\w+\.py", word):
                check_options(word, words[position + 1 :], monkeypatch)
                return


def check_tscnc(arguments: list[str], monkeypatch) -> None:
    if arguments[:1] == ["evaluate"]:
        check_options(tscnc.__file__, arguments, monkeypatch)
    elif arguments not in (["--help"], ["--version"]):
        tscnc._parser().parse_args(arguments)


class Parsed(Exception):
    """The options were good."""


def check_options(script: str, arguments: list[str], monkeypatch) -> None:
    """SystemExit where an option is unknown or its value wrong; nothing is run with them. No GPU is asked for."""
    parse = HfArgumentParser.parse_args_into_dataclasses
    here = {"use_cpu": "true", "bf16": "false", "fp16": "false", "tf32": "false"}

    def parse_only(self, args, **options):
        known = {action.dest for action in self._actions}
        args = [*args, *(f"--{name}={value}" for name, value in here.items() if name in known)]
        unknown = parse(self, args, **options)[-1]
        if unknown:
            self.error(f"unknown option(s) {unknown}")
        raise Parsed

    if "--help" in arguments:
        return
    with monkeypatch.context() as patch:
        patch.setattr(HfArgumentParser, "parse_args_into_dataclasses", parse_only)
        patch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(Parsed):
            runpy.run_path(script, run_name="__main__")


# ---- of these tests ----


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("python recipes/vit_cifar10.py --target_sparsity 0.9 --output_dir x", None),
        ("A=1 accelerate launch --num_processes 2 recipes/vit_cifar10.py \\\n  --output_dir x > log 2>&1", None),
        ("accelerate launch -m tscnc_hf.cli evaluate --model x --attacks clean pgd-20  # comment", None),
        ("make test && make demo PYTHON=python3 | tee log", None),
        ("tscnc inspect you/your-model --layers", None),
        ("python recipes/vit_cifar10.py --target_sparsity 1.9 --output_dir x", "target_sparsity=1.9"),
        ("python recipes/vit_cifar10.py --target_spars 0.9 --output_dir x", "unknown option"),
        ("python recipes/vit_cifar10.py --config recipes/configs/none.yaml", "none.yaml does not exist"),
        ("echo; python recipes/none.py", "none.py does not exist"),
        ("accelerate launch -m tscnc_hf.cli evaluate --attack clean", "required: --model"),
        ("tscnc evaluate --model x --n 0", "n=0"),
        ("tscnc inspect", "FOLDER_OR_HUB_ID"),
        ("make tests", "no target ['tests']"),
        ("python -m tscnc_hf.none", "no module tscnc_hf.none"),
    ],
)
def test_what_is_wrong_with_a_command_is_found(code, wrong, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    said = ""
    for words in commands(code):
        try:
            check_command(words, monkeypatch)
        except (SystemExit, AssertionError) as error:
            said += f"{error} {capsys.readouterr().err}"
    assert wrong in said if wrong else not said
