"""A self-contained HTML page of a sweep: its table, learning curves and swept keys."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePath
from string import Template
from typing import Any, TypeAlias
from urllib.parse import quote

from app.runtime.escaping import escape_control, escape_strings
from app.sweep.report.plots import axis_scale, format_value, is_number, run_labels
from app.sweep.report.table import Curves, Results

JsonValue: TypeAlias = str | int | float | bool | None
# What `plot.js` draws, or `axes` of parallel coordinates, or `bars` with values from 0 to 1.
Figure: TypeAlias = dict[str, Any]

NOT_DRAWN = {"loss_std", "total_samples", "total_correct"}


def render_page(results: Results, figures: Mapping[str, Figure]) -> str:
    """Return an HTML page that loads nothing from elsewhere.

    Args:
        results: Results of the sweep; its texts may contain anything, as they are never run.
        figures: Figures by heading, drawn at the end of the page.
    """
    script = f"{_read('plot.js')}\n{_read('page.js')}"
    return Template(_read("page.html")).substitute(
        script=script,
        hash=f"sha256-{_sha256(script)}",
        title=html.escape(escape_control(results.title)),
        style=_read("page.css"),
        content=_embeddable_json(escape_strings(_content(results, figures))),
    )


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _embeddable_json(content: Mapping[str, object]) -> str:
    """JSON without `<`, which could end the script element that contains it."""
    return json.dumps(content, allow_nan=False).replace("<", r"\u003c")


def _content(results: Results, figures: Mapping[str, Figure]) -> dict[str, object]:
    table = results.table
    folders = table.reindex(columns=["folder"])["folder"]
    return {
        "columns": [str(column) for column in table.columns],
        "rows": [[_json_value(cell) for cell in row] for row in table.to_dict("split")["data"]],
        "labels": run_labels(results),
        # Relative whatever the folder is called, even `javascript:...`.
        "links": [f"./{quote(PurePath(str(folder)).as_posix())}" for folder in folders],
        "curves": [_drawn_curves(results.curves.get(folder, {})) for folder in folders],
        "keys": {key: _axis(table[key].tolist()) for key in results.keys if key in table},
        "goals": [
            {
                "metric": goal.metric,
                "mode": goal.mode,
                "column": f"best_{goal.metric}",
                "quantity": f"{goal.stage}/{goal.name}",
            }
            for goal in results.goals
        ],
        "figures": dict(figures),
    }


def _json_value(cell: object) -> JsonValue:
    if isinstance(cell, bool | str):
        return cell
    if isinstance(cell, int | float):
        return cell if math.isfinite(cell) else None
    return None if format_value(cell) == "null" else str(cell)


def _axis(values: list[object]) -> dict[str, object]:
    """The scale of a swept key, and the value of each run on it."""
    scale = axis_scale(values)
    numbers: list[JsonValue] = [value if is_number(value) else None for value in values]
    texts: list[JsonValue] = [format_value(value) for value in values]
    return {"scale": scale, "values": texts if scale == "category" else numbers}


def _drawn_curves(curves: Curves) -> dict[str, dict[str, list[float | None]]]:
    return {
        stage: {
            name: list(map(_rounded, values))
            for name, values in columns.items()
            if name not in NOT_DRAWN and not all(map(math.isnan, values))
        }
        for stage, columns in curves.items()
    }


def _rounded(value: float) -> float | None:
    """Round to the digits that a curve can show, which keeps the page of many runs small."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
