"""Write the outputs of the model for every sample of an evaluated stage."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from app.callbacks.prediction_files import Format, PredictionFileWriter
from app.callbacks.selection import check_selection, configured_logit_outputs, is_due, pick_targets
from app.runtime.errors import UserError
from app.training.accumulator import StageResult
from app.training.events import Callback, StageStart, StepEnd
from app.training.history import History

log = logging.getLogger(__name__)
EVALUATION_STAGES = ("valid", "test")


class PredictionWriter(Callback):
    """Write the outputs of evaluated stages to folders such as `predictions/epoch001_valid/`.

    The outputs of the evaluation are reused; the model does not run again. Each batch is copied to
    the CPU at once, since all outputs together may exceed the memory of the device.

    Args:
        folder: Run folder.
        config: Resolved configuration, which tells which part of a batch is the target and which
            outputs are class logits.
        stages: `valid`, `test` or both.
        format: As in `app.callbacks.prediction_files.PredictionFileWriter`.
        every_n_epochs: Interval between validations whose outputs are written. The outputs of
            other evaluations are always written.
        paths: The file of each sample of a stage, in order, where samples are files.

    Raises:
        UserError: A stage, the format or the interval is not allowed.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        stages: Sequence[str] = ("test",),
        format: Format = "auto",
        every_n_epochs: int = 1,
        paths: dict[str, list[str]] | None = None,
    ) -> None:
        check_selection(stages, EVALUATION_STAGES, every_n_epochs)
        if format not in get_args(Format):
            raise UserError(f"format={format!r}; allowed: {', '.join(get_args(Format))}")
        self.folder, self.config = folder / "predictions", config
        self.stages, self.format, self.every_n_epochs = stages, format, every_n_epochs
        self.paths = paths or {}
        self.files: PredictionFileWriter | None = None

    def on_stage_start(self, start: StageStart) -> None:
        self.files = None
        if start.stage in self.stages and is_due(start, self.every_n_epochs, self.config):
            folder = self.folder / f"{start.point.label}_{start.stage}"
            self.files = PredictionFileWriter(
                folder,
                configured_logit_outputs(self.config),
                self.format,
                paths=self.paths.get(start.stage),
                class_names=self.config["data"].get("class_names"),
                colors=self.config["data"].get("colors"),
            )

    def needs_all_ranks(self, start: StageStart) -> bool:  # noqa: ARG002
        return self.files is not None

    def on_step_end(self, step: StepEnd) -> None:
        if self.files is not None and step.outputs is not None:
            self.files.add(step.outputs, pick_targets(step.batch, self.config))

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        if self.files is None:
            return
        self.files.close()
        if not (self.files.batches or self.files.boxes or self.files.num_images):
            log.warning(
                "no predictions written for stage %s: the task's steps return no outputs",
                result.stage,
            )
