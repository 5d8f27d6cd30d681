"""Run two samples through the task, so that mismatches are reported before the first epoch."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import torch
from torch import Tensor

from app.config.schema import DataConfig
from app.data.batch import BatchLoader
from app.runtime.errors import UserError
from app.runtime.nested import pick
from app.training.distill import DistillTask
from app.training.stage_loop import PREDICT
from app.training.supervised import SupervisedTask
from app.training.task import Task, check_step_output


def dry_run(task: Task, stage: str, loader: BatchLoader, data: DataConfig) -> None:
    """Run two samples through the model, the loss and the metrics of a stage.

    Raises:
        UserError: Something does not fit; the message names the component and the shapes.
    """
    batch = loader.first(2)
    if isinstance(task, SupervisedTask):
        if stage == "train" or task.patches is None:
            _check_input_shape(pick(batch, task.inputs), stage, data)
    elif stage == "train":
        return
    task.model.eval()
    try:
        validating = nullcontext() if stage == PREDICT else task.metrics[stage].validating()
        with torch.no_grad(), task.precision.autocast(), warnings.catch_warnings(), validating:
            # (N, 1) against (N,) broadcasts to (N, N): a loss without error, but never intended.
            warnings.filterwarnings("error", "Using a target size")
            if isinstance(task, SupervisedTask):
                inputs = pick(batch, task.inputs)
                _check_num_classes(task.predict(inputs), data)
                if stage == "train" and isinstance(task, DistillTask):
                    task.distillation_loss(inputs, task.forward(inputs))
            elif stage == PREDICT:
                task.predict_step(batch)
            if stage != PREDICT:
                check_step_output(task, stage, task.eval_step(stage, batch))
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"task: {type(task).__name__} cannot process the {stage} data: {reason}"
        ) from error


def _check_input_shape(inputs: object, stage: str, data: DataConfig) -> None:
    shape = list(inputs.shape[1:]) if isinstance(inputs, Tensor) else None
    if shape is not None and shape != data.input_shape:
        raise UserError(
            f"data.input_shape={data.input_shape}, but the {stage} samples have shape {shape}"
        )


def _check_num_classes(outputs: object, data: DataConfig) -> None:
    num_outputs = outputs.shape[1] if isinstance(outputs, Tensor) and outputs.ndim > 1 else None
    if data.num_classes is not None and num_outputs not in (None, data.num_classes):
        raise UserError(
            f"data.num_classes={data.num_classes}, but the model has {num_outputs} outputs"
        )
