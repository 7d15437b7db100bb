"""What slimming did to a model: a report."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class SlimRow:
    """
    One group of units.

    Attributes:
        name, kind: see `StructureGroup`.
        units, kept: before and after.
        unread, constant: of those that were cut, the units that nobody read, and those that were read but constant.
        left: dead units that stay.
        why: the reason, empty if `left` is 0 and the group can be cut.
    """

    name: str
    kind: str
    units: int
    kept: int
    unread: int
    constant: int
    left: int
    why: str


@dataclass(frozen=True)
class SlimReport:
    """
    What was cut out of a model and what it costs now.

    Attributes:
        rows: one per group of units.
        parameters_before, parameters_after: all parameters.
        macs_before, macs_after: multiply-accumulates of one input (see `flops_report`).
        input_shape: of that input, batch first.
        difference: largest difference of the outputs, in float64, relative to the largest output.
        config: for a model with a config, how the widths are kept in it: "as before" (nothing was cut), "config" (in
            the config's own fields) or "recorded" (in `config.tscnc`); empty otherwise.
    """

    rows: tuple[SlimRow, ...]
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    input_shape: tuple[int, ...]
    difference: float
    config: str = ""

    @property
    def removed(self) -> int:
        return sum(row.units - row.kept for row in self.rows)

    def to_dict(self) -> dict:
        return asdict(self) | {
            "rows": [asdict(row) for row in self.rows],
            "input_shape": list(self.input_shape),
            "removed": self.removed,
        }

    def to_markdown(self) -> str:
        lines = [
            "| read by | kind | units | kept | cut: unread | cut: constant | dead but left | why |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        lines += [
            f"| `{r.name}` | {r.kind} | {r.units} | {r.kept} | {r.unread} | {r.constant} | {r.left} | {r.why} |"
            for r in self.rows
        ]
        units, kept = sum(row.units for row in self.rows), sum(row.kept for row in self.rows)
        lines += [
            "",
            "| | before | after | ratio |",
            "| --- | ---: | ---: | ---: |",
            _line("units", units, kept),
            _line("parameters", self.parameters_before, self.parameters_after),
            _line(f"MACs, input {' x '.join(map(str, self.input_shape))}", self.macs_before, self.macs_after),
        ]
        return "\n".join(lines)


def _line(name: str, before: int, after: int) -> str:
    return f"| {name} | {before:,} | {after:,} | {before / max(after, 1):.2f} |"
