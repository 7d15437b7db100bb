"""The table of architectures is what its command makes of the rows, and the command does what it says."""

import runpy

import pytest

from tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def command():
    return runpy.run_path(str(ROOT / "docs" / "architectures.py"))


def test_the_page_is_the_table_of_the_rows(command):
    rows = command["read_rows"]()
    assert rows.keys() == set(command["names"]()), "run: python docs/architectures.py"
    assert command["PAGE"].read_text(encoding="utf-8") == command["table"](rows)
    kinds = [cells["library"] for cells in rows.values()]
    assert kinds.count("timm") >= 40 and kinds.count("transformers") >= 20
    for name, cells in rows.items():
        no = [column for column in command["COLUMNS"] if cells[column] == "no"]
        assert bool(no) == bool(cells.get("why")), name
        assert all(cells[column].startswith("ok") for column in command["COLUMNS"] if column not in no), name


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "ResNet"])
def test_a_row_is_made_by_training(name, command, tmp_path):
    made, kept = command["row"](name, tmp_path), command["read_rows"]()[name]
    assert made.pop("slim").startswith("ok") == kept.pop("slim").startswith("ok")  # which units go hangs on rounding
    assert made == kept


def test_a_refusal_is_a_row_and_anything_else_a_fault(command, tmp_path):
    scope = command["row"].__globals__
    original = scope["trained"]
    try:
        scope["trained"] = lambda *args, **options: "because"
        assert command["row"]("ViT", tmp_path)["why"] == "because"
        scope["trained"] = lambda *args, **options: 1 / 0
        with pytest.raises(command["Fault"], match="ViT, train: ZeroDivisionError"):
            command["row"]("ViT", tmp_path)
    finally:
        scope["trained"] = original
