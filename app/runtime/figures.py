"""Save matplotlib figures."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from app.runtime.files import atomic_write


def save_figure(path: Path, figure: Figure) -> None:
    """Save the figure atomically as a PNG file."""
    atomic_write(path, partial(figure.savefig, format="png", dpi=120))
