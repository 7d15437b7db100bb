"""The direction of imports between the rooms, and the public names."""

import ast
import sys
from pathlib import Path

import pytest

from tests.processes import run_command


PACKAGE = Path(__file__).parents[1] / "tscnc_hf"
ROOMS = ["method", "data", "artifact", "evaluation", "inference", "training", "cli"]  # the ground floor first
NOT_FOR_METHOD = {"transformers", "datasets", "huggingface_hub", "accelerate", "timm"}


def imported_modules(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_itself_and_the_rooms_below(room):
    allowed = {"tscnc_hf"} | {f"tscnc_hf.{name}" for name in ROOMS[: ROOMS.index(room) + 1]}
    files = list((PACKAGE / room).rglob("*.py"))
    assert len(files) > 1, room
    for path in files:
        for module in imported_modules(path):
            if module.split(".")[0] == "tscnc_hf":
                assert ".".join(module.split(".")[:2]) in allowed, f"{path.name} imports {module}"
            elif room == "method":
                assert module.split(".")[0] not in NOT_FOR_METHOD, f"{path.name} imports {module}"


def test_no_folder_has_more_than_a_dozen_modules():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        modules = [path.name for path in folder.glob("*.py") if not path.name.startswith("__")]
        assert len(modules) <= 12, f"{folder.relative_to(PACKAGE)}: {', '.join(sorted(modules))}"


def test_public_names_are_there():
    import tscnc_hf

    for name in tscnc_hf.__all__:
        assert getattr(tscnc_hf, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'TSCNC'"):
        _ = tscnc_hf.TSCNC


def test_method_room_does_not_load_transformers():
    code = (
        "import sys, tscnc_hf.method.constraints, tscnc_hf.method.pruning.pruner, tscnc_hf.method.adversarial.pgd\n"
        "assert 'transformers' not in sys.modules and 'timm' not in sys.modules"
    )
    run_command([sys.executable, "-c", code])


def calls_of_auto_classes(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value).split(".")[-1]
            if owner.startswith("Auto") and node.func.attr in ("from_pretrained", "from_config"):
                yield node


def test_no_code_of_a_repository_is_run_wherever_an_auto_class_reads_one():
    found = 0
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "recipes").rglob("*.py")]:
        for call in calls_of_auto_classes(path):
            found += 1
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert said.get("trust_remote_code") == "False", (
                f"{path.name}, line {call.lineno}: trust_remote_code=False"
            )
    assert found
