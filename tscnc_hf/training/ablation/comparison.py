"""Arms of an ablation beside each other: means, spreads, and differences paired by seed with their intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t

from tscnc_hf.artifact.card.formatting import format_number, number
from tscnc_hf.training.ablation.rows import DENSE


@dataclass(frozen=True)
class Estimate:
    """Mean of n values, one a pair, and its 95 % interval [low, high] (Student's t; infinite from a single one)."""

    mean: float
    low: float
    high: float
    n: int


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Estimate:
    """
    The mean of a - b, pair by pair, with its interval (`interval`).

    Raises:
        ValueError: no pairs, or not as many of one as of the other.
    """
    if not a or len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values: pairs need as many of both, and one at least")
    return interval([x - y for x, y in zip(a, b, strict=True)], confidence)


def interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The mean of some values, one at least, with its interval under Student's t of n - 1 degrees of freedom."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean, -math.inf, math.inf, len(values))
    half = t.ppf(0.5 + confidence / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half, len(values))


def by_arm(rows: Iterable[Mapping]) -> dict[tuple[str, float], dict[str, dict[int, Mapping]]]:
    """
    Rows of an ablation as (model, sparsity) -> arm -> seed -> row, sparsities rising, arms as they come.

    Raises:
        ValueError: two rows of one cell; rows of a model that were not measured on the same images.
    """
    groups: dict[tuple[str, float], dict[str, dict[int, Mapping]]] = {}
    images: dict[str, tuple] = {}
    for row in sorted(rows, key=lambda row: (row["model"], row["sparsity"])):
        seeds = groups.setdefault((row["model"], row["sparsity"]), {}).setdefault(row["arm"], {})
        if row["seed"] in seeds:
            cell = f"{row['arm']} of {row['model']} at {row['sparsity']:g}, seed {row['seed']}"
            raise ValueError(f"there are two rows of {cell} (split {row['split']}): compare the rows of one file")
        own = (row.get("split", "test"), row.get("n"))
        if (others := images.setdefault(row["model"], own)) != own:
            raise ValueError(
                f"rows of {row['model']} are of {others[1]} images of the {others[0]} split, and of {own[1]} of the "
                f"{own[0]} split: compare those of one file"
            )
        seeds[row["seed"]] = row
    return groups


def comparison_markdown(rows: Iterable[Mapping], attack: str, baselines: Sequence[str] = ("plain",)) -> str:
    """
    One table a model: an arm a line at each sparsity. Accuracies as mean ± standard deviation over seeds in percent;
    what is left of the dense network's accuracy under the attack, the mean of the ratios of each seed in percent with
    its 95 % interval, of arm "dense" where it has rows, else of the arm's own dense training; the difference to each
    baseline paired by seed in points with its 95 % interval; and medians over seeds of the condition numbers, lost
    ranks and empty matrices.

    Args:
        attack: the name of the accuracy that counts, beside "clean".
        baselines: the arms to compare with; at a sparsity where one has no rows its differences are left out.

    Raises:
        ValueError: a baseline that no row is of, an attack that a row has no accuracy under.
    """
    rows = list(rows)
    if without := [row for row in rows if attack not in row["accuracy"]]:
        raise ValueError(
            f"{len(without)} of {len(rows)} rows have no accuracy under {attack!r}, such as that of "
            f"{without[0]['arm']!r}, which has {', '.join(without[0]['accuracy'])}: name an attack that all have"
        )
    known = list(dict.fromkeys(row["arm"] for row in rows))
    if unknown := [name for name in baselines if name not in known]:
        raise ValueError(f"no row is of the baseline {', '.join(unknown)}; the arms are {', '.join(known)}")
    parts, last = [], None
    minus = " | ".join(f"{attack}, minus {baseline}" for baseline in baselines)
    groups = by_arm(rows)
    for (model, sparsity), arms in groups.items():
        if model != last:
            parts += [] if last is None else [""]
            parts += [
                f"**{model}**\n",
                f"| sparsity | arm | seeds | clean | {attack} | of the dense {attack} | {minus} | "
                "median kappa | largest kappa | ranks lost | empty |",
                f"| ---: | --- | ---: | ---: | ---: | ---: |{' ---: |' * len(baselines)} ---: | ---: | ---: | ---: |",
            ]
            last = model
        for arm, seeds in arms.items():
            cells = [f"{100 * sparsity:g} %", arm, str(len(seeds))]
            cells += [_spread([row["accuracy"][name] for row in seeds.values()]) for name in ("clean", attack)]
            dense = groups.get((model, 0), {})
            cells.append(_share(seeds, dense.get(DENSE, dense.get(f"{DENSE}-{arm}", {})), attack) if sparsity else "")
            cells += [_minus(seeds, arms.get(name, {}), attack) if arm != name else "" for name in baselines]
            for key in ("median_kappa", "max_kappa", "lost_ranks", "empty_matrices"):
                known = [value for row in seeds.values() if not math.isnan(value := number(row[key]))]
                cells.append(format_number(statistics.median(known) if known else None, ".3g"))
            parts.append(f"| {' | '.join(cells)} |")
    return "\n".join(parts) + "\n"


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{deviation}"


def _of_both(
    seeds: Mapping[int, Mapping], others: Mapping[int, Mapping], attack: str
) -> tuple[list[float], list[float]] | None:
    """Accuracies of the seeds that both have."""
    both = sorted(set(seeds) & set(others))
    return tuple([side[seed]["accuracy"][attack] for seed in both] for side in (seeds, others)) if both else None


def _minus(seeds: Mapping[int, Mapping], others: Mapping[int, Mapping], attack: str) -> str:
    found = _of_both(seeds, others, attack)
    return "" if found is None else _shown(paired_difference(*found), "+.1f")


def _share(seeds: Mapping[int, Mapping], dense: Mapping[int, Mapping], attack: str) -> str:
    found = _of_both(seeds, dense, attack)
    if found is None or 0 in found[1]:
        return ""
    return _shown(interval([pruned / whole for pruned, whole in zip(*found, strict=True)]), ".0f")


def _shown(estimate: Estimate, style: str) -> str:
    mean, low, high = (format(100 * value, style) for value in (estimate.mean, estimate.low, estimate.high))
    return mean if estimate.n < 2 else f"{mean} ({low} to {high})"
