"""Write the tables that benchmarks print, for `docs/benchmarks.md`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd

SKIPPED = 77  # exit code of a benchmark that cannot run here, as in automake


@dataclass(frozen=True)
class Table:
    """Rows that a benchmark measured.

    Attributes:
        name: Name of its CSV file; unique among all benchmarks.
        title: Heading.
        rows: Values by column; a column that a row lacks stays empty.
        notes: Sentences below the table: what was compared, what is missing.
    """

    name: str
    title: str
    rows: Sequence[dict[str, Any]]
    notes: Sequence[str] = field(default_factory=tuple)

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame(list(self.rows))

    def markdown(self) -> str:
        """Return the heading, the table and the notes as Markdown."""
        frame = self.frame()
        lines = ["| " + " | ".join(map(str, frame.columns)) + " |"]
        lines.append("| " + " | ".join("---" for _ in frame.columns) + " |")
        for row in frame.itertuples(index=False):
            lines.append("| " + " | ".join(map(_cell, row)) + " |")
        return "\n".join([f"## {self.title}", "", *lines, "", *self.notes]).rstrip() + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value).replace("|", "\\|")


def add_output_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of all benchmarks that names the folder of their tables."""
    parser.add_argument("--out", type=Path, help="folder for the tables, as Markdown and CSV")


def publish(tables: Sequence[Table], out: Path | None) -> None:
    """Print the tables; also write each into `out`, as `<name>.md` and `<name>.csv`."""
    for table in tables:
        print(table.markdown())
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{table.name}.md").write_text(table.markdown(), encoding="utf-8")
            table.frame().to_csv(out / f"{table.name}.csv", index=False)


def skip(reason: str) -> NoReturn:
    """End a benchmark that cannot run on this machine."""
    print(reason, file=sys.stderr)
    raise SystemExit(SKIPPED)
