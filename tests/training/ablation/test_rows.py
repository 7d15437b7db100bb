"""Rows of an ablation that several commands write, and what tells one cell from another."""

from tests.training.ablation.test_grid import a_row
from tscnc_hf import TSCNCConfig
from tscnc_hf.training.ablation.grid import Cell, Grid
from tscnc_hf.training.ablation.rows import Results, read_rows


def test_rows_of_two_commands_at_a_time_are_all_kept(tmp_path):
    one, two = Results(tmp_path / "rows.jsonl"), Results(tmp_path / "rows.jsonl")
    one.add(a_row())
    two.add(a_row(seed=1))
    one.add(a_row(seed=2))
    assert [row["seed"] for row in read_rows(tmp_path / "rows.jsonl")] == [0, 1, 2]


def test_a_cell_is_told_by_every_option_that_decides_it(tmp_path):
    def fingerprint(**options) -> str:
        config = TSCNCConfig(str(tmp_path), use_cpu=True, report_to="none", **options)
        return Grid(config, build=None, data=None, label="m").fingerprint(Cell("plain", 0.9, 0))

    changed = {"adam_beta2": 0.95, "optim_args": "momentum=0.9", "data_seed": 0, "dataloader_drop_last": True}
    found = {fingerprint(), *(fingerprint(**{name: value}) for name, value in changed.items())}
    assert len(found) == 5 and fingerprint(logging_steps=7) == fingerprint()
