"""What may be typed on the command line instead of a path: `~/folder`, and `latest` for a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from app.config.overrides import quote
from app.experiment.job import START_CONFIG
from app.runtime.errors import ConfigError, ConfigIssue
from app.training.checkpoint.rotation import CHECKPOINT_DIR, SUFFIX

LATEST = "latest"
OUTPUT_VARIABLE, DEFAULT_OUTPUT = "APP_OUTPUT", "outputs"
RUN_PATTERNS = ("*", "*/*", "sweeps/*/*/*")  # of run folders in the output folder


def expand(overrides: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Replace `~/` at the start of a value, and `latest` of keys that name a run.

    Args:
        overrides: Overrides as typed.
        environ: Environment variables.

    Raises:
        ConfigError: There is no latest run.
    """
    expanded = [_expand_home(text) for text in overrides]
    values = dict(text.partition("=")[::2] for text in expanded)
    output = Path(values.get("output", environ.get(OUTPUT_VARIABLE, DEFAULT_OUTPUT)).strip("'"))
    weights = f"*{SUFFIX}"
    files = {
        "ckpt": weights,
        "init.weights": weights,
        "teacher": weights,
        "resume": START_CONFIG,
    }
    for position, text in enumerate(expanded):
        key, _, value = text.partition("=")
        if key in files and value == LATEST:
            folder = latest_run(output, files[key])
            if folder is None:
                problem = f"={LATEST}: there is no such run in {output.absolute()}"
                raise ConfigError([ConfigIssue(key, problem)])
            expanded[position] = f"{key}={quote(str(folder))}"
    return expanded


def _expand_home(text: str) -> str:
    key, _, value = text.partition("=")
    return f"{key}={quote(str(Path(value).expanduser()))}" if value.startswith("~/") else text


def latest_run(output: Path, pattern: str) -> Path | None:
    """Return the run that saved a checkpoint last, or else started last; None if there is none.

    Args:
        output: The folder of all runs.
        pattern: Which file a run must have among its checkpoints.
    """
    folders = [
        folder
        for run in RUN_PATTERNS
        for folder in output.absolute().glob(f"{run}/{CHECKPOINT_DIR}")
        if any(folder.glob(pattern))
    ]
    latest = max(folders, key=lambda folder: folder.stat().st_mtime, default=None)
    return None if latest is None else latest.parent
