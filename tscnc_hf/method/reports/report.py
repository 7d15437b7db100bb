"""What all reports have: figures as plain JSON types, and tables for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict
from typing import Any, ClassVar


class Report:
    """To derive dataclasses of figures from. `SUMMARY` names the properties that are figures beside the fields."""

    SUMMARY: ClassVar[tuple[str, ...]] = ()

    def summary(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.SUMMARY}

    def to_dict(self) -> dict:
        """Plain JSON types; infinities are the strings "inf" and "-inf", and what is not there (NaN) is None."""
        return _plain(self.summary() | asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def over_rows(figure: Callable[[list], Any], column: str, empty: float = 0) -> property:
    """A figure of one column of a report's rows, `empty` where there are none."""
    return property(lambda report: figure([getattr(row, column) for row in report.rows]) if report.rows else empty)


def by(sizes: Iterable[int]) -> str:
    """A shape in words: 3 x 32 x 32."""
    return " x ".join(map(str, sizes))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]], text: Collection[str] = ()) -> str:
    """Columns of numbers, aligned to the right, but for the first one and those whose heads are in `text`."""
    rule = ["---" if name in (head[0], *text) else "---:" for name in head]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (head, rule, *rows))
