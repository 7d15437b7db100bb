"""Which rows go where: carved-out splits and limits, the same in every run."""

import numpy as np


def stratified_split(labels: np.ndarray, fraction: float, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a fraction of the rows, each class in its proportion; always the same rows for the same labels.

    No seed on purpose: a model trained with one seed and pruned with another must not see the rows held out before.

    Args:
        labels: int64 (n,).
        fraction: in (0, 1). round(fraction * n) rows are held out, but never the last one of a class.
        purpose: what the rows are for, for messages.

    Returns:
        rest, held: int64 row numbers, ascending.

    Raises:
        ValueError: the fraction is out of range or one of the two sides would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction held out for {purpose} is {fraction}; give one above 0 and below 1.")
    # RandomState's streams are frozen by NumPy; those of the newer generators may change between versions.
    order = np.random.RandomState(0).permutation(len(labels))
    _, of_class, counts = np.unique(labels[order], return_inverse=True, return_counts=True)
    quota = np.floor(fraction * counts).astype(np.int64)
    missing = round(fraction * len(labels)) - quota.sum()
    by_remainder = np.argsort(quota - fraction * counts, kind="stable")
    may_give = by_remainder[(counts - quota)[by_remainder] > 1]
    quota[may_give[: max(missing, 0)]] += 1
    rank = np.empty(len(labels), dtype=np.int64)
    rank[np.argsort(of_class, kind="stable")] = np.concatenate([np.arange(count) for count in counts])
    chosen = rank < quota[of_class]
    rest, held = np.sort(order[~chosen]), np.sort(order[chosen])
    if len(rest) == 0 or len(held) == 0:
        raise ValueError(
            f"{len(labels)} rows in {len(counts)} classes are too few to hold out {fraction:g} of them for {purpose}. "
            "Give more rows or a larger fraction."
        )
    return rest, held


def first_rows(indices: np.ndarray, labels: np.ndarray, limit: int | None, argument: str) -> np.ndarray:
    """The first `limit` of `indices` (all for None).

    Rows that lie class by class, as an image folder's do, are put in a fixed random order first: their first rows
    would all be of one class. (They do where neighbours differ in class less than half as often as by chance.)

    Args:
        indices: int64 (m,), rows of a split.
        labels: int64 (n,), of the whole split.
        limit: 1 or more; more than m takes all.
        argument: the limit's name, for messages.
    """
    if limit is None:
        return indices
    if limit < 1:
        raise ValueError(f"{argument}={limit}; give 1 or more, or None for all rows.")
    mine = labels[indices]
    _, counts = np.unique(mine, return_counts=True)
    by_chance = len(mine) * (1 - np.sum((counts / max(len(mine), 1)) ** 2))
    grouped = (np.diff(mine) >= 0).all() or np.count_nonzero(np.diff(mine)) < by_chance / 2
    if limit < len(indices) and len(counts) > 1 and grouped:
        indices = np.random.RandomState(0).permutation(indices)
    return indices[:limit]
