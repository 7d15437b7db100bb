"""
Writes the table of the models in recipes/models into docs/results.md, from their results.json.

    python docs/shelf.py
"""

import json
from pathlib import Path

from tscnc_hf.artifact.card.formatting import format_bytes, format_percent


ROOT = Path(__file__).parents[1]
PAGE, SHELF = ROOT / "docs" / "results.md", ROOT / "recipes" / "models"
BEGIN, END = "<!-- Written by `python docs/shelf.py`. -->\n", "<!-- Until here. -->\n"
ATTACKS = {"clean": "clean", "pgd-20": "PGD-20", "autoattack": "AutoAttack"}
NAMES = {"digits": "digits", "cifar10": "CIFAR-10 (JPEG copy)"}


def shelf_table(shelf: Path = SHELF) -> str:
    lines = [
        "| model | parameters | data, epsilon (L-infinity), n | zeros | packed file | "
        + " | ".join(ATTACKS.values())
        + " |",
        "| --- | ---: | --- | ---: | ---: |" + " ---: |" * len(ATTACKS),
    ]
    for folder in sorted(path for path in shelf.iterdir() if path.is_dir()):
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        robustness, sparsity = results["robustness"], results["sparsity"]
        data = f"{NAMES[results['dataset']]}, {radius(robustness['threat_model']['epsilon'])}, {robustness['n']:,}"
        size = format_bytes((folder / "model.sparse.safetensors").stat().st_size)
        cells = [f"`{folder.name}`", f"{sparsity['parameters']:,}", data, format_percent(sparsity["sparsity"]), size]
        lines.append("| " + " | ".join([*cells, *accuracies(robustness)]) + " |")
        lines.append(
            "| "
            + " | ".join(["its dense reference", "", "", "0 %", "", *accuracies(results["dense"]["robustness"])])
            + " |"
        )
    return "\n".join(lines) + "\n"


def accuracies(robustness: dict) -> list[str]:
    found = {attack["name"]: attack for attack in robustness["attacks"]}
    return [accuracy(found[name]) if name in found else "not run" for name in ATTACKS]


def accuracy(attack: dict) -> str:
    return f"{format_percent(attack['accuracy'])} ({100 * attack['low']:.1f} to {100 * attack['high']:.1f})"


def radius(epsilon: float) -> str:
    steps = 255 * epsilon
    return f"{steps:.0f}/255" if abs(steps - round(steps)) < 1e-9 else f"{epsilon:g}"


def with_table(page: str, table: str) -> str:
    """The page with the table between its two remarks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), shelf_table()), encoding="utf-8")
