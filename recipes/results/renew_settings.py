"""
Rows of ablations from before `RunIdentity` say their settings by another digest. This gives them the digest of now:

    python -m recipes.results.renew_settings --config recipes/configs/ablation_cnn.yaml

Options as of `recipes/ablation.py`, with which the rows were made. Each cell's old digest is computed; where it is the
row's, it is replaced. Other rows stay as they are, so that a second time changes nothing.
"""

import hashlib
import json

from recipes.ablation import AblationArguments, make_grid
from tscnc_hf.artifact.files.atomic import atomic_file
from tscnc_hf.cli.recipe import parse
from tscnc_hf.training.ablation.grid import grid as grid_of
from tscnc_hf.training.ablation.rows import Results


def old_digest(grid, cell, data_arguments) -> str:
    """Of options, model, description of the data, and what was measured on what: as it was until November 2026."""
    about = {"data": grid.data.description, "augmentation": data_arguments.augmentation}
    about |= {"augmentation_seed": grid.config.seed, **grid.about}

    def training(cell) -> list:
        before = [] if cell.pretraining is None else training(grid.dense(cell))
        return [grid.settings(cell).method_dict(), about, *before]

    settings = [training(cell), grid.split, list(grid.attacks), grid.n]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def renew(rows: list[dict], digests: dict[tuple, tuple[str, str]]) -> tuple[list[dict], int, int]:
    """
    The rows with new digests, how many were replaced, and how many had theirs before.

    Args:
        digests: (model, arm, sparsity, seed, split) -> (old, new) digest.
    """
    renewed, replaced, before = [], 0, 0
    for row in rows:
        key = tuple(row[name] for name in ("model", "arm", "sparsity", "seed", "split"))
        old, new = digests.get(key, (None, None))
        replaced, before = replaced + (row["settings"] == old), before + (row["settings"] == new)
        renewed.append(row | {"settings": new} if row["settings"] == old else row)
    return renewed, replaced, before


def main(args: list[str] | None = None) -> None:
    config, data_arguments, arguments = options = parse(AblationArguments, args)
    grid, results = make_grid(*options), Results(arguments.results)
    cells = grid_of(arguments.arms, arguments.sparsities, arguments.seeds, arguments.pretraining)
    digests = {
        (grid.label, cell.arm, cell.sparsity, cell.seed, grid.split): (
            old_digest(grid, cell, data_arguments),
            grid.fingerprint(cell),
        )
        for cell in cells
    }
    rows, replaced, before = renew(results.rows, digests)
    if replaced:
        with atomic_file(results.path) as temporary:
            temporary.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")
    print(
        f"{results.path}: {replaced} rows renewed, {before} had the digest of now, of {len(cells)} cells; the other "
        f"{len(rows) - replaced - before} rows are of other settings"
    )


if __name__ == "__main__":
    main()
