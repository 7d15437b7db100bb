"""The table of the shelf in docs/results.md is what its command makes of the folders."""

import runpy

from tests.docs.pages import ROOT


def test_the_table_is_that_of_the_folders():
    command = runpy.run_path(str(ROOT / "docs" / "shelf.py"))
    page, table = command["PAGE"].read_text(encoding="utf-8"), command["shelf_table"]()
    assert page == command["with_table"](page, table), "run: python docs/shelf.py"
    assert table.count("| its dense reference |") == len(list(command["SHELF"].iterdir())) >= 5
