"""Save matplotlib figures."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure

from app.runtime.files import atomic_write


def save_figure(path: Path, figure: Figure) -> None:
    """Save the figure atomically as a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    atomic_write(path, lambda file: file.write(content.getvalue()))
