"""Rows of an ablation that several commands write, and what tells one cell from another."""

from types import SimpleNamespace

import pytest

from recipes.results.renew_settings import renew
from tests.training.ablation.test_grid import a_row
from tscnc_hf import TSCNCConfig
from tscnc_hf.training.ablation.grid import Cell, Grid
from tscnc_hf.training.ablation.grid import grid as cells_of
from tscnc_hf.training.ablation.rows import Results, read_rows


def test_rows_of_two_commands_at_a_time_are_all_kept(tmp_path):
    one, two = Results(tmp_path / "rows.jsonl"), Results(tmp_path / "rows.jsonl")
    one.add(a_row())
    two.add(a_row(seed=1))
    one.add(a_row(seed=2))
    assert [row["seed"] for row in read_rows(tmp_path / "rows.jsonl")] == [0, 1, 2]


DATA = {"train": {"digest": "a", "augmentation": "flips"}, "test": {"digest": "b"}, "asked": {"dataset": "/home/me"}}


@pytest.fixture
def grid(tmp_path):
    def make(data=None, about=None, split="test", n=None, **options) -> Grid:
        config = TSCNCConfig(str(tmp_path), use_cpu=True, report_to="none", **options)
        data = SimpleNamespace(identity=data or DATA)
        return Grid(config, build=None, data=data, label="m", split=split, n=n, about=about or {})

    return make


def test_a_cell_is_told_by_every_option_that_decides_it(grid):
    cell = Cell("plain", 0.9, 0)
    changed = {"adam_beta2": 0.95, "optim_args": "momentum=0.9", "data_seed": 0, "dataloader_drop_last": True}
    found = {grid().fingerprint(cell), *(grid(**{name: value}).fingerprint(cell) for name, value in changed.items())}
    assert len(found) == 5 and grid(logging_steps=7).fingerprint(cell) == grid().fingerprint(cell)


def test_a_cell_is_told_by_its_data_model_dense_training_and_what_was_measured(grid):
    cell, dense = Cell("plain", 0.9, 0), Cell("plain", 0.9, 0, pretraining={"max_steps": 5})
    grids = [grid(), grid(about={"architecture": "vit"}), grid(DATA | {"train": {"digest": "c"}})]
    others = [dense, Cell("plain", 0.9, 0, pretraining={"max_steps": 6}), Cell("plain", 0.9, 1)]
    folders = {g.folder(cell) for g in grids} | {grids[0].folder(other) for other in others}
    assert len(folders) == 6
    measured = {g.fingerprint(cell) for g in (grids[0], grid(split="validation"), grid(n=7))}
    assert len(measured) == 3 and len({g.folder(cell) for g in (grids[0], grid(split="validation"), grid(n=7))}) == 1
    elsewhere = grid(DATA | {"asked": {"dataset": "uoft-cs/cifar10"}})
    assert elsewhere.fingerprint(dense) == grids[0].fingerprint(dense)


def test_a_cell_is_told_by_the_attack_that_it_is_measured_with(grid):
    """Which is that of all cells, whatever this one trains with."""
    own, plain = Cell("strong", 0.9, 0, {"epsilon": "4/255"}), Cell("plain", 0.9, 0)
    assert len({grid(epsilon=epsilon).fingerprint(own) for epsilon in ("1/255", "4/255", "8/255")}) == 3
    assert len({grid(norm=norm).fingerprint(Cell("l2", 0.9, 0, {"norm": "l2"})) for norm in ("linf", "l2")}) == 2
    assert grid().fingerprint(own) != grid().fingerprint(plain)


def test_arms_that_say_the_same_of_their_dense_training_share_one(grid):
    usual = grid().config.weight_decay
    arms = {
        "a": {"pretraining": {"tsc_weight": 1e-6}},
        "b": {"pretraining": {"tsc_weight": 1e-6, "weight_decay": usual}},
    }
    cells = cells_of(arms, [0.9], [0], {})
    assert [cell.arm for cell in cells] == ["dense-a", "dense-b", "a", "b"]
    assert [cell.arm for cell in grid().untrained(cells, cells)] == ["dense-a"]


def test_an_option_that_comes_later_changes_no_fingerprint(grid, monkeypatch):
    cell, known = Cell("plain", 0.9, 0, pretraining={}), TSCNCConfig.method_dict
    before = grid().fingerprint(cell)
    monkeypatch.setattr(TSCNCConfig, "method_dict", lambda self: known(self) | {"later": self.seed * 0})
    assert grid().fingerprint(cell) == before
    monkeypatch.setattr(TSCNCConfig, "method_dict", lambda self: known(self) | {"later": int(self.seed == 0)})
    assert grid().fingerprint(cell) != before


def test_rows_of_old_digests_are_renewed_once():
    rows = [a_row(), a_row(seed=1), a_row(seed=2, settings="new 2"), a_row(seed=3, settings="of others")]
    digests = {("m", "plain", 0.9, seed, "test"): ("s", f"new {seed}") for seed in range(5)}
    found, replaced, before = renew(rows, digests)
    assert [row["settings"] for row in found] == ["new 0", "new 1", "new 2", "of others"]
    assert (replaced, before) == (2, 1) and renew(found, digests) == (found, 0, 3)
    assert [row | {"settings": None} for row in found] == [row | {"settings": None} for row in rows]
