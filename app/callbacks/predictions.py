"""What the model gave for every sample of an evaluated stage."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from app.callbacks.prediction_files import Format, PredictionFiles
from app.callbacks.selection import check_when, class_outputs, is_due, targets_of
from app.runtime.errors import UserError
from app.training.accumulator import StageResult
from app.training.events import Callback, StageStart, StepEnd
from app.training.history import History

log = logging.getLogger(__name__)
STAGES = ("valid", "test")


class PredictionWriter(Callback):
    """Writes `predictions/epoch001_valid/` from the outputs that are measured anyway.

    Each batch is copied to the host as it comes, since all outputs at once may be more than the
    device holds.

    Args:
        folder: Of the run.
        config: Says which part of a batch is the target, and which outputs are logits of classes.
        stages: `valid`, `test`.
        format: As of `app.callbacks.prediction_files.PredictionFiles`.
        every_n_epochs: Of the validations in training; all else is always written.

    Raises:
        UserError: A stage or the format is none of these.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        stages: Sequence[str] = ("test",),
        format: Format = "auto",
        every_n_epochs: int = 1,
    ) -> None:
        check_when(stages, STAGES, every_n_epochs)
        if format not in get_args(Format):
            raise UserError(f"format={format!r}; allowed: {', '.join(get_args(Format))}")
        self.folder, self.config = folder / "predictions", config
        self.stages, self.format, self.every_n_epochs = stages, format, every_n_epochs
        self.files: PredictionFiles | None = None

    def on_stage_start(self, start: StageStart) -> None:
        self.files = None
        if start.stage in self.stages and is_due(start, self.every_n_epochs, self.config):
            folder = self.folder / f"epoch{start.epoch:03d}_{start.stage}"
            self.files = PredictionFiles(folder, class_outputs(self.config), self.format)

    def needs_all_ranks(self, start: StageStart) -> bool:  # noqa: ARG002
        return self.files is not None

    def on_step_end(self, step: StepEnd) -> None:
        if self.files is not None and step.outputs is not None:
            self.files.add(step.outputs, targets_of(step.batch, self.config))

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        if self.files is None:
            return
        self.files.close()
        if not (self.files.parts or self.files.done):
            log.warning("no predictions of %s: its steps tell no outputs", result.stage)
