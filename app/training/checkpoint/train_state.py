"""State of a training run that survives a restart, because checkpoints contain it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.distributed.tensor import DTensor

from app.config.resolve import PlainConfig, get_by_path
from app.config.resume import first_difference, optimizer_changed
from app.config.saved import resolve_saved
from app.config.schema import Job
from app.distributed.collectives import broadcast_object, rank
from app.distributed.strategies import full_tensor
from app.runtime.background_writer import BackgroundWriter
from app.runtime.errors import UserError
from app.runtime.nested import Nested, map_tensors
from app.training.checkpoint.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    top_k_filename,
    write_model,
)
from app.training.checkpoint.header import read_info, verify_checksum
from app.training.checkpoint.rotation import (
    BEST_CHECKPOINT,
    CHECKPOINT_DIR,
    LAST_CHECKPOINT,
    SUFFIX,
    CheckpointRotation,
    list_checkpoints,
    remove_file,
)
from app.training.history import Point, Row
from app.training.limits import SaveSchedule
from app.training.optim.optim_wrapper import OptimWrapperDict
from app.training.optim.weight_averaging import WeightAveraging
from app.training.task import Task

log = logging.getLogger(__name__)
FIXED_WITHIN_EPOCH = (  # configuration keys that cannot change between two steps of an epoch
    "seed",
    "data.batch_size",
    "data.sampling",
    "metric.train",
    "trainer.gradient_norm",
)
MISMATCH_ERRORS = (  # raised by load_state_dict for the state of another object
    ValueError,
    KeyError,
    RuntimeError,
    TypeError,
    IndexError,
    AttributeError,
)


class Phase(StrEnum):
    """Stage of an epoch that runs next."""

    TRAIN = "train"
    VALID = "valid"


class TrainingEnd(StrEnum):
    """Why training has ended."""

    LIMIT = "limit"  # `max_epochs` or `max_steps`
    TIME = "time"  # `max_seconds`
    DIVERGED = "diverged"  # a loss or gradient was not finite
    GOAL = "goal"  # the goal was reached, or has not improved for too long
    PRUNED = "pruned"  # by a hyper-parameter search
    CALLBACK = "callback"  # a callback asked for it


class Stateful(Protocol):
    """Object whose state, tensors and plain values, is saved in checkpoints."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrainState:
    """Everything that training changes, and its checkpoints.

    Args:
        task: Task with the model and its optimizers.
        averaging: Moving average of the weights.
        folder: Run folder.
        job: Job whose configuration is saved in each checkpoint; None if there is none.
        nonfinite: State of the handling of non-finite steps.
        callbacks: Callbacks whose states are saved by rank 0.
        save_schedule: How many training checkpoints to keep, and whether to write them in the
            background.
    """

    def __init__(
        self,
        task: Task,
        averaging: WeightAveraging,
        folder: Path,
        job: Job | None,
        nonfinite: Stateful,
        callbacks: Stateful,
        save_schedule: SaveSchedule = SaveSchedule(),  # noqa: B008
    ) -> None:
        self.task, self.averaging = task, averaging
        self.folder, self.job = folder, job
        self.nonfinite, self.callbacks = nonfinite, callbacks
        self.rotation, self.writer = (
            CheckpointRotation(folder, save_schedule.keep_last),
            BackgroundWriter(save_schedule.in_background),
        )
        self.save_count = 0  # training checkpoints saved so far
        self.epoch = 0  # last epoch with all its batches trained on
        self.point = Point(0)  # of the current weights
        self.phase = Phase.TRAIN
        self.end: TrainingEnd | None = None
        self.batches = 0  # training batches so far, over all epochs
        self.batches_in_epoch = 0  # training batches so far in the current or last epoch
        self.mid_epoch: dict[str, Any] | None = None  # position within an interrupted epoch
        self.history: list[Row] = []

    @property
    def next_epoch(self) -> int:
        """Epoch of the stage that runs next."""
        is_within = self.phase is Phase.TRAIN or self.mid_epoch is not None
        return self.epoch + 1 if is_within else self.epoch

    @property
    def is_between_epochs(self) -> bool:
        """Whether the last epoch is complete and no other has begun."""
        return self.phase is Phase.TRAIN and self.mid_epoch is None

    def folder_contains_run(self) -> bool:
        """Return whether there are training checkpoints, or the files of a run of another job."""
        has_status = self.job is None and (self.folder / "status.json").exists()
        return has_status or bool(list_checkpoints(self.folder))

    def save_best(self) -> None:
        """Save the weights with all that testing needs, and as a bare `model.pt`."""
        checkpoint = self._make_checkpoint(None)
        self._submit_save(BEST_CHECKPOINT, checkpoint)
        if rank() == 0:
            path, model = self.folder / "model.pt", checkpoint.model
            self.writer.submit(lambda: write_model(path, model))

    def save_weights(self, name: str) -> None:
        """Save the weights as a checkpoint that can be tested."""
        self._submit_save(name, self._make_checkpoint(None))

    @property
    def is_between_parts(self) -> bool:
        """Whether everything is measured that was trained: after an epoch or a part of one."""
        in_part = self.mid_epoch is not None and bool(self.mid_epoch["rows"].get("blocks"))
        return self.phase is Phase.TRAIN and not in_part

    def remove_stale_top_k(self, points: list[Point]) -> None:
        """Remove each checkpoint of the k best whose point is not in the list."""
        kept = [top_k_filename(point) for point in points]
        files = (self.folder / CHECKPOINT_DIR).glob(f"epoch*{SUFFIX}") if rank() == 0 else ()
        for path in files:
            if path.name not in kept:
                remove_file(path)

    def remove_checkpoint(self, name: str) -> None:
        if rank() == 0:
            remove_file(self.folder / CHECKPOINT_DIR / name)

    def save_last(self) -> None:
        """Save the complete state as `last.safetensors`."""
        self.save_count += 1
        training = {
            "optimizers": self.optimizers.state_dict(),
            "averaging": self.averaging.state_dict(),
            "batches": self.batches,
            "batches_in_epoch": self.batches_in_epoch,
            "phase": str(self.phase),
            "end": self.end and str(self.end),
            "mid_epoch": self.mid_epoch,
            "callbacks": self.callbacks.state_dict(),
            "nonfinite": self.nonfinite.state_dict(),
        }
        checkpoint = self._make_checkpoint(self._snapshot(training))
        if rank() == 0:
            path = self.folder / CHECKPOINT_DIR / LAST_CHECKPOINT
            self.writer.submit(lambda: save_checkpoint(path, checkpoint, self.rotation), True)

    @contextmanager
    def flushed(self) -> Iterator[None]:
        """Wait on exit, even after an exception, until all checkpoints are written to disk."""
        try:
            yield
        finally:
            self.writer.wait()

    def load_weights(self, file: Path) -> int:
        """Load the weights of a checkpoint, and the state of the task besides the model.

        Args:
            file: A checkpoint or a run folder.

        Returns:
            The epoch of these weights.

        Raises:
            UserError: The checkpoint is damaged, or belongs to another model, task or loss.
        """
        return self._load_weights(file, self._read(file))

    def _load_weights(self, file: Path, checkpoint: Checkpoint) -> int:
        load_weights(self.task.model, checkpoint.model, str(file))
        try:
            self.task.load_state_dict(checkpoint.task)
        except MISMATCH_ERRORS as error:
            raise UserError(f"{file} belongs to another task or loss: {error}") from error
        self.point = Point(checkpoint.epoch, checkpoint.step)
        return checkpoint.epoch

    def load_best_weights(self) -> int:
        """Load the best weights so far and return their epoch."""
        return self.load_weights(self.folder / CHECKPOINT_DIR / BEST_CHECKPOINT)

    def load(self, file: Path) -> bool:
        """Load the complete state of a training checkpoint, to resume from it.

        Returns:
            Whether the optimizer or schedule has another configuration than the saved one, so that
            its state is new.

        Raises:
            UserError: The checkpoint contains weights only, belongs to another model, loss or
                optimizer, or was saved within an epoch of a different configuration.
        """
        checkpoint = self._read(file)
        self.epoch = self._load_weights(file, checkpoint)
        training = checkpoint.training
        if training is None:
            raise UserError(
                f"{file} contains weights only; training resumes from a {LAST_CHECKPOINT}"
            )
        before, now = self._configs(checkpoint)
        if training["mid_epoch"]:
            _check_same_within_epoch(file, before, now)
        try:
            schedule_changed = optimizer_changed(before, now) if before else False
            self.optimizers.load_state_dict(training["optimizers"], schedule_changed)
            self.averaging.load_state_dict(training["averaging"])
        except MISMATCH_ERRORS as error:
            raise UserError(f"{file} belongs to another optimizer or average: {error}") from error
        try:
            self.nonfinite.load_state_dict(training["nonfinite"])
            self.callbacks.load_state_dict(training["callbacks"])
            self.phase = Phase(training["phase"])
        except MISMATCH_ERRORS as error:
            raise UserError(
                f"{file} belongs to other callbacks or is damaged: {error!r}"
            ) from error
        self.batches, self.batches_in_epoch = training["batches"], training["batches_in_epoch"]
        self.mid_epoch = training["mid_epoch"]
        same_time = get_by_path(before, "trainer.max_time") == get_by_path(now, "trainer.max_time")
        was_time_up = training["end"] == TrainingEnd.TIME
        self.end = TrainingEnd.TIME if was_time_up and same_time else None
        is_same_job = self.job is None or not self.job.differences
        if training["end"] == TrainingEnd.CALLBACK and is_same_job:
            self.end = TrainingEnd.CALLBACK
        self.history, self.save_count = checkpoint.history, checkpoint.number
        self.rotation.resume_from(file)
        return schedule_changed

    def _configs(self, checkpoint: Checkpoint) -> tuple[PlainConfig, PlainConfig]:
        """Return the saved and the current configuration; empty ones if either is missing."""
        if self.job is None or checkpoint.config is None:
            return {}, {}
        return resolve_saved(checkpoint.config), self.job.plain

    def _read(self, file: Path) -> Checkpoint:
        """Load a checkpoint on rank 0 and broadcast it."""
        self.writer.wait()
        checkpoint = broadcast_object(load_checkpoint(file) if rank() == 0 else None)
        assert checkpoint is not None
        return checkpoint

    @property
    def optimizers(self) -> OptimWrapperDict:
        """Optimizers of the task."""
        assert self.task.optimizers is not None, "the task has no optimizer"
        return self.task.optimizers

    def saved_point(self, name: str, verify: bool = True) -> Point | None:
        """Return when the weights in a file were measured; None if it is missing or damaged.

        All ranks must call this and get the same result.

        Args:
            name: Name of a checkpoint file.
            verify: Whether to read the complete file and verify its checksum, or only the summary
                at its end.
        """
        self.writer.wait()
        point = None
        if rank() == 0:
            read = verify_checksum if verify else read_info
            with suppress(UserError):  # the caller decides what to do about a missing file
                info = read(self.folder / CHECKPOINT_DIR / name)
                point = Point(info.epoch, info.step)
        return broadcast_object(point)

    def _submit_save(self, name: str, checkpoint: Checkpoint) -> None:
        if rank() == 0:
            path = self.folder / CHECKPOINT_DIR / name
            self.writer.submit(lambda: save_checkpoint(path, checkpoint))

    def _make_checkpoint(self, training: dict[str, Any] | None) -> Checkpoint:
        job = self.job
        return Checkpoint(
            config=job.saved if job else None,
            model=self._snapshot(self.task.model.state_dict()),
            task=self._snapshot(self.task.state_dict()),
            epoch=self.epoch if training else self.point.epoch,
            history=self.history,
            training=training,
            number=self.save_count,
            step=None if training else self.point.step,
        )

    def _snapshot(self, nested: Nested) -> Nested:
        """Gather tensors on the CPU, and copy them if training continues while they are written."""
        return gather_to_cpu(nested, copies=self.writer.in_background)


def gather_to_cpu(nested: Nested, copies: bool = False) -> Nested:
    """Gather full, contiguous tensors on the CPU of rank 0; every rank must call this.

    Args:
        nested: Tensors, which may be sharded. Those that share their memory share it afterwards.
        copies: Whether tensors that are on the CPU already are copied.
    """
    gathered: dict[tuple[Any, ...], Tensor] = {}

    def gather(tensor: Tensor) -> Tensor:
        full = full_tensor(tensor.detach())
        if rank() > 0:
            return full
        is_shareable = tensor.numel() > 0 and not isinstance(tensor, DTensor)
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if is_shareable and identity in gathered:
            return gathered[identity]
        copy = full.to("cpu", copy=copies).contiguous()
        if is_shareable:
            gathered[identity] = copy
        return copy

    return map_tensors(gather, nested)


def _check_same_within_epoch(file: Path, before: PlainConfig, now: PlainConfig) -> None:
    """Check that the rest of an interrupted epoch has the same batches and columns."""
    changes = (
        first_difference(get_by_path(before, key), get_by_path(now, key), key)
        for key in FIXED_WITHIN_EPOCH
    )
    for change in filter(None, changes):
        raise UserError(
            f"{change}: it cannot change within an epoch, and {file} was saved in the middle "
            "of one; allowed: the saved value, or a checkpoint from the end of an epoch"
        )
