"""Accuracies where classes are of uneven size, and whether a network has collapsed: counts in, figures out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping


FEW = 8  # images; what is found on fewer says little
NEARLY_EVERY = 0.95  # of the images

Confusion = Mapping[int, Mapping[int, int]]  # true class -> named class -> images


def confusion(labels: Iterable[int], guesses: Iterable[int]) -> dict[int, dict[int, int]]:
    """True class -> named class -> images, of the classes that there are, in order."""
    counts = Counter(zip(map(int, labels), map(int, guesses), strict=True))
    found: dict[int, dict[int, int]] = {}
    for (label, guess), count in sorted(counts.items()):
        found.setdefault(label, {})[guess] = count
    return found


def recalls(found: Confusion) -> dict[int, float]:
    """Fraction of each class that is named correctly."""
    return {label: row.get(label, 0) / sum(row.values()) for label, row in found.items()}


def balanced_accuracy(found: Confusion) -> float:
    """The mean of the classes' accuracies, over the classes that have images: each class counts alike."""
    shares = recalls(found)
    return sum(shares.values()) / len(shares)


def worst_class(found: Confusion) -> dict[str, float]:
    """{"label", "accuracy" (fraction), "n"} of the class that is named correctly least often; the first of several."""
    shares = recalls(found)
    label = min(shares, key=shares.get)
    return {"label": label, "accuracy": shares[label], "n": sum(found[label].values())}


def collapse(found: Confusion) -> dict[str, float] | None:
    """
    {"class", "share", "largest_class"} where one class is named for nearly every image, and for nearly every image of
    the other classes; None otherwise, and where there are too few images or classes to tell.

    An honest network on uneven data names the largest class as often as it is there, but not for images of others; of
    one that has collapsed the accuracy is the share of the class that it names. `share` is of the images that are
    named so, `largest_class` of those that belong to the largest class.
    """
    rows = {label: sum(row.values()) for label, row in found.items()}
    named = Counter()
    for row in found.values():
        named.update(row)
    n, (guess, count) = sum(rows.values()), named.most_common(1)[0]
    others = n - rows.get(guess, 0)
    if n < FEW or not others or count < NEARLY_EVERY * n:
        return None
    if count - found.get(guess, {}).get(guess, 0) < NEARLY_EVERY * others:
        return None
    return {"class": guess, "share": count / n, "largest_class": max(rows.values()) / n}
