"""Which rows go where: what splits are for, carved-out ones and limits, the same in every run."""

from collections.abc import Sequence

import numpy as np

from tscnc_hf.method.numbers import whole_number


SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}  # as `datasets` names them, but of any case


def split_of(name: str) -> str | None:
    """What a split or a folder of this name is for: "train", "validation", "test", or None where that is unknown."""
    return next((split for split, names in SPLIT_NAMES.items() if name.casefold() in names), None)


def choose_splits(
    stored: Sequence[str], test_split: str | None, source: str, test_only: bool = False, unread: str = ""
) -> dict[str, str]:
    """
    The splits to use, whatever their names: what they are for -> their name as stored, the one to test on last. That
    is the one asked for, else the one for tests, else the one for validation. Of several for the same the one that is
    called so exactly is meant, else the first as `SPLIT_NAMES` has them.

    Args:
        stored: the names of a data set's splits.
        test_split: the one to test on, by its name or by what it is for; None chooses.
        source: the data set's name, for messages.
        test_only: there need be none to train on, and a single one is tested on whatever its name.
        unread: what else is there and in no split, for messages.

    Returns:
        "train", "validation" and "test" as far as they are there, "test" under another name if it is not for tests. No
        test where rows of train are to be held out for it.

    Raises:
        ValueError: there is no such split; none to train on; none to test on, and something beside train that may be
            meant for it.
    """
    meant = {}
    for split, names in SPLIT_NAMES.items():
        if found := [name for name in stored if split_of(name) == split]:
            meant[split] = min(found, key=lambda name: (name != split, names.index(name.casefold())))
    train, there = meant.get("train"), ", ".join([*stored, *filter(None, [unread])])
    others = [name for name in stored if name != train]
    if train is None and not test_only:
        raise ValueError(f"data set {source!r} has no split 'train', only {there}. Rename one to train.")
    test = meant.get("test", meant.get("validation"))
    if test_split is not None:
        test = test_split if test_split in stored else meant.get(test_split)
        if test is None or test == train:
            allowed = ", ".join([*others, *filter(None, [unread])]) or "only train"
            raise ValueError(f"test_split={test_split!r}: data set {source!r} has {allowed}.")
    if test is None and train is None:
        if len(others) > 1:
            raise ValueError(f"data set {source!r} has {', '.join(others)}: name one with test_split.")
        test = others[0]
    if test is None and (others or unread):
        known = ", ".join(SPLIT_NAMES["test"] + SPLIT_NAMES["validation"])
        named = f"Name the one to test on with test_split, such as {others[0]!r}, or rename" if others else "Rename"
        raise ValueError(
            f"data set {source!r} has {there}. None is to test on by its name ({known}; of files in lower case), and "
            f"a fifth of train would be held out instead. {named} what is for tests, or give train alone."
        )
    chosen = {split: meant[split] for split in ("train", "validation") if meant.get(split) not in (None, test)}
    if test is not None:
        purpose = split_of(test)
        chosen[test if purpose in (None, "train", *chosen) else purpose] = test
    return chosen


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

    Raises:
        ValueError: the limit is no whole number, or below 1.
    """
    if limit is None:
        return indices
    limit = whole_number(argument, limit, 1)
    mine = labels[indices]
    _, counts = np.unique(mine, return_counts=True)
    by_chance = len(mine) * (1 - np.sum((counts / max(len(mine), 1)) ** 2))
    grouped = (np.diff(mine) >= 0).all() or np.count_nonzero(np.diff(mine)) < by_chance / 2
    if limit < len(indices) and len(counts) > 1 and grouped:
        indices = np.random.RandomState(0).permutation(indices)
    return indices[:limit]
