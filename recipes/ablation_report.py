"""
What an ablation found: tables and figures from its rows.

    python recipes/ablation_report.py --rows recipes/results/ablation.jsonl --output recipes/results
"""

from dataclasses import dataclass, field
from pathlib import Path

from tscnc_hf.cli.parser import ConfigParser


@dataclass
class ReportArguments:
    """What is shown, and where it goes."""

    rows: list[str] = field(metadata={"help": "Files of rows that recipes/ablation.py has written."})
    output: str = field(default="outputs/ablation", metadata={"help": "Folder of ablation.md and the figures."})
    attack: str = field(default="pgd-20", metadata={"help": "The accuracy that counts, beside the clean one."})
    baselines: list[str] = field(
        default_factory=lambda: ["plain"], metadata={"help": "The arms that the others are compared with."}
    )
    figures: bool = field(default=True, metadata={"help": "Draw figures too; for many arms a table says more."})
    name: str = field(default="ablation", metadata={"help": "Beginning of the names of the files written."})


def main(args: list[str] | None = None) -> None:
    (arguments,) = ConfigParser([ReportArguments]).parse(args)

    from tscnc_hf.artifact.card.figures import save_figure
    from tscnc_hf.artifact.files.atomic import atomic_file
    from tscnc_hf.training.ablation.comparison import comparison_markdown
    from tscnc_hf.training.ablation.correlation import correlation_markdown
    from tscnc_hf.training.ablation.figures import arms_figure, kappa, own_rows, scatter_figure
    from tscnc_hf.training.ablation.rows import read_rows

    try:
        rows = [row for path in arguments.rows for row in read_rows(path)]
        if not own_rows(rows):
            raise ValueError(f"no finished cell of a pruned model in {', '.join(arguments.rows)}")
        if missing := [row for row in rows if arguments.attack not in row["accuracy"]]:
            known = ", ".join(missing[0]["accuracy"])
            raise ValueError(f"attack {arguments.attack!r} was not measured in every cell; there are {known}")
        table = comparison_markdown(rows, arguments.attack, arguments.baselines)
        if related := correlation_markdown(rows, arguments.attack):
            table += f"\n**Rank correlation with {arguments.attack} accuracy, over arms and seeds**\n\n{related}"
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None

    def robust(row):
        return 100 * row["accuracy"][arguments.attack]

    folder, label = Path(arguments.output), "median effective condition number"
    if arguments.figures:
        accuracy = f"{arguments.attack} accuracy, %"
        figures = {
            "robustness": arms_figure(rows, robust, accuracy, log=False),
            "conditioning": arms_figure(rows, kappa, label, log=True),
            "robustness_over_conditioning": scatter_figure(rows, kappa, robust, accuracy, label),
        }
        for name, figure in figures.items():
            save_figure(figure, folder / f"{arguments.name}_{name}.png")
    with atomic_file(folder / f"{arguments.name}.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    print(f"{table}\n{'Table and figures' if arguments.figures else 'Table'}: {folder.resolve()}")


if __name__ == "__main__":
    main()
