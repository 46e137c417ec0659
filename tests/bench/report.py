"""What a bench found: a table for people, a record for machines."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from typing import Any

Cell = str | float | None


@dataclass(frozen=True, slots=True)
class Goal:
    """`figure` is the measured one, in the unit that `what` names."""

    what: str
    figure: float
    met: bool


@dataclass(slots=True)
class Report:
    """A `Cell` of None was not measured. `notes` are shown below the table."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        table = [self.columns, *(tuple(_shown(cell) for cell in row) for row in self.rows)]
        widths = [max(len(row[i]) for row in table) for i in range(len(self.columns))]
        # The first column holds names, the others figures.
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            )
            for row in table
        ]
        goals = [f"{'met   ' if goal.met else 'MISSED'}  {goal.what}: {_shown(goal.figure)}" for goal in self.goals]
        return "\n".join([f"== {self.title}", *(line.rstrip() for line in lines), *self.notes, *goals])

    def summary(self) -> dict[str, Any]:
        goals = [{"what": goal.what, "figure": _rounded(goal.figure), "met": goal.met} for goal in self.goals]
        return {"goals": goals, "notes": self.notes}

    def records(self) -> list[dict[str, Cell]]:
        return [dict(zip(self.columns, map(_rounded, row), strict=True)) for row in self.rows]


def machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, Python {platform.python_version()}"


def _rounded(cell: Cell) -> Cell:
    return round(cell, 4) if isinstance(cell, float) else cell


def _shown(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.1f}" if abs(cell) >= 10 else f"{cell:.3f}"
    return str(cell)
