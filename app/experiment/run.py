"""What one rank does: build the parts, then train, measure, predict or search."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from app.callbacks.prediction_files import PredictionFiles
from app.callbacks.tables import truncate_to_history
from app.config.instantiate import Instantiator
from app.config.schema import Config, FreezeConfig, Job
from app.data.batch import BatchLoader
from app.data.datamodule import stages_run
from app.distributed.collectives import rank, world_size
from app.distributed.strategies import SingleDevice
from app.experiment.export import export
from app.experiment.factory import (
    Components,
    make_averaging,
    make_callbacks,
    make_components,
    make_limits,
    make_optimizers,
    make_strategy,
)
from app.experiment.status import StatusWriter, versions
from app.experiment.tuner import find_batch_size, find_batch_size_first, find_learning_rate
from app.losses.weighted_sum import class_outputs
from app.runtime.device import choose_device, describe_device
from app.runtime.nested import Key, pick
from app.runtime.signals import StopSignal
from app.training.checkpoint.checkpoint import find_checkpoint
from app.training.events import Callback, Callbacks
from app.training.history import best_epoch
from app.training.optim.weight_averaging import WeightAveraging
from app.training.precision import make_deterministic
from app.training.pruning import Pruning
from app.training.supervised import SupervisedTask
from app.training.task import Task
from app.training.trainer import PREDICT, Trainer

log = logging.getLogger(__name__)
T = TypeVar("T")


def execute(
    job: Job, folder: Path, stop: StopSignal | None = None, local_rank: int = 0
) -> float | None:
    """Runs what the configuration says; each rank its part.

    Args:
        job: The configuration, checked.
        folder: Of the run, there already.
        stop: Who asks to end before the plan is over.
        local_rank: The number of this rank on its machine.

    Returns:
        The goal's best value, where training measured one.

    Raises:
        UserError: The user must put something right; `status.json` says so, too.
        Stopped: It was asked to end, and did.
    """
    config, build = job.config, Instantiator(job.trusted)
    device = choose_device(config.trainer.accelerator, config.trainer.devices, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    make_deterministic(config.trainer.deterministic)
    about = {key: job.plain[key] for key in ("mode", "ckpt", "name", "tags", "notes", "seed")}
    goes_on = config.resume not in (None, "auto")
    status = StatusWriter(folder, about, config.goal, device, goes_on)
    with status.recording() if rank() == 0 else nullcontext():
        if config.mode == "train" and config.trainer.batch_size_finder and not goes_on:
            job = find_batch_size_first(job, device, folder)
            config = job.config
        parts = make_components(config, build, device)
        log_run_header(config, parts, folder)
        if config.mode in TUNERS:
            parallel = SingleDevice(parts.task.model)
            parts.task.optimizers = make_optimizers(config, build, parts, parallel, scheduled=False)
            parts.freezing.apply(1)
            TUNERS[config.mode](config, parts, folder)
            return None
        with _watchers(job, build, parts, status, folder) as callbacks:
            trainer = make_trainer(job, build, parts, callbacks, folder, stop)
            status.nonfinite = trainer.nonfinite.stats
            if config.mode == "train":
                if goes_on:
                    trainer.resume(Path(str(config.resume)))
                if rank() == 0:
                    truncate_to_history(folder, trainer.state.history)
                value = train(trainer, parts)
                status.final_status = trainer.outcome
                return value
            MODES[config.mode](trainer, parts, config)
            return None


@contextmanager
def _watchers(
    job: Job, build: Instantiator, parts: Components, status: StatusWriter, folder: Path
) -> Iterator[Callback]:
    """Those who watch, told of the end however it comes; nobody watches in ranks other than 0."""
    if rank() > 0:
        yield Callback()
        return
    named = make_callbacks(job.config, build, folder, parts.task.model, job)
    callbacks = Callbacks([status, *named])
    try:
        yield callbacks
    finally:
        callbacks.on_run_end(status.history)


def make_trainer(
    job: Job,
    build: Instantiator,
    parts: Components,
    callbacks: Callback,
    folder: Path,
    stop: StopSignal | None = None,
) -> Trainer:
    """The loop around the parts; where it trains, with an optimizer and what goes with it."""
    config, averaging, parallel = job.config, None, SingleDevice(parts.task.model)
    if config.mode == "train":
        parallel = make_strategy(config, parts)
        parts.task.optimizers = make_optimizers(config, build, parts, parallel)
        averaging = make_averaging(config, build, parts.task.model)
    return Trainer(
        parts.task,
        make_limits(config),
        folder,
        config.goal,
        callbacks,
        config.seed,
        parts.device,
        averaging or WeightAveraging(parts.task.model),
        parts.freezing,
        {name: monitor for name, monitor in config.checkpoint.monitors.items() if monitor},
        job,
        parallel,
        stop,
        Pruning(config.sweep.trial, config.goal),
    )


def train(trainer: Trainer, parts: Components) -> float | None:
    """Trains, then tests the best; gives the goal's best value."""
    trainer.fit(parts.loaders["train"], parts.loaders.get("valid"))
    state, goal = trainer.state, trainer.goal
    found = best_epoch(state.history, goal)
    if found is None:
        log.warning("%s was never a number: the last weights are kept as best", goal.metric)
        state.save_best()
    epoch = state.load_best_weights()
    kind = "best" if found and epoch == found.epoch else "last"
    log.info("the %s weights are those of epoch %d", kind, epoch)
    if "test" in parts.loaders and not trainer.is_pruned:
        trainer.evaluate(parts.loaders["test"], "test", epoch)
    log.info("everything is in %s", state.folder)
    return found.value if found else None


def evaluate(trainer: Trainer, parts: Components, config: Config) -> None:
    """Measures a checkpoint on the stage that the mode names."""
    file = restore_from(trainer, config)
    result = trainer.run_stage(config.mode, trainer.state.epoch, parts.loaders[config.mode])
    log.info("%s of %s: %s", config.mode, file, _numbers(result.row))
    log.info("everything is in %s", trainer.state.folder)


def predict(trainer: Trainer, parts: Components, config: Config) -> None:
    """Writes what a checkpoint predicts."""
    file, task, loader = restore_from(trainer, config), parts.task, parts.loaders[PREDICT]
    classes = logit_keys(task)
    names = getattr(loader, "names", None)
    files = PredictionFiles(trainer.state.folder, classes, config.predict.format, names)
    has_targets = isinstance(task, SupervisedTask) and names is None
    for batch, outputs in trainer.predictions(loader):
        files.add(outputs, pick(batch, task.targets) if has_targets else None)  # type: ignore[attr-defined]
    files.close()
    log.info("predictions of %s are in %s", file, trainer.state.folder)


def export_model(trainer: Trainer, parts: Components, config: Config) -> None:
    """Writes a checkpoint's model for use elsewhere."""
    file, model = restore_from(trainer, config), parts.task.model
    sample = torch.rand(2, *config.data.input_shape)
    path = export(model.cpu().eval(), sample, config.export.format, trainer.state.folder)
    log.info("the model of %s is in %s", file, path)


def logit_keys(task: Task) -> list[Key]:
    """The parts of predictions that are logits of classes; none where a task has its own way."""
    own_way = type(task).predict_step is not SupervisedTask.predict_step
    return [] if own_way or not isinstance(task, SupervisedTask) else class_outputs(task.loss)


MODES = {"valid": evaluate, "test": evaluate, "predict": predict, "export": export_model}


def restore_from(trainer: Trainer, config: Config) -> Path:
    """Takes the weights of the checkpoint that `ckpt` names; gives its file."""
    assert config.ckpt is not None
    file = find_checkpoint(Path(config.ckpt))
    trainer.state.epoch = trainer.state.load_weights(file)
    return file


def tune_lr(config: Config, parts: Components, folder: Path) -> None:
    """Tries learning rates; suggests the one that lowers the loss fastest."""
    suggestion = find_learning_rate(parts.task, parts.loaders["train"], config.find, folder)
    log.info("suggested: optimizer.lr=%.3g", suggestion)
    log.info("the losses at each learning rate are in %s", folder / "find_lr.csv")


def tune_batch_size(config: Config, parts: Components, folder: Path) -> None:
    """Tries batch sizes; suggests the fastest that fits."""
    suggestion = find_batch_size(
        parts.task, parts.loaders["train"], config.data.batch_size, config.find, folder
    )
    log.info("suggested: data.batch_size=%d", suggestion)
    log.info("the speed of each batch size is in %s", folder / "find_batch_size.csv")


TUNERS = {"find_lr": tune_lr, "find_batch_size": tune_batch_size}


def _numbers(row: dict[str, Any]) -> str:
    hidden = ("epoch", "stage", "epoch_time", "samples/s", "loss_std")
    return ", ".join(f"{key} {value:.6g}" for key, value in row.items() if key not in hidden)


def log_run_header(config: Config, parts: Components, folder: Path) -> None:
    """Says in the log what is about to run, so that a wrong assumption is seen at once."""
    model, goal = parts.task.model, config.goal
    weights = sum(parameter.numel() for parameter in model.parameters())
    stop = f"after {goal.patience} validations without a better value" if goal.patience else "off"
    lines = {
        "run": f"{config.name} (mode {config.mode}, seed {config.seed})",
        "folder": folder,
        "notes": " ".join([*(f"[{tag}]" for tag in config.tags), config.notes]),
        "model": f"{config.model['_target_']}, {weights:,} parameters",
        "task": config.task["_target_"],
        "data": "; ".join(_described(s, parts.loaders.get(s)) for s in stages_run(config)),
        "device": f"{_several()}{describe_device(parts.device)}, {parts.task.precision.name}",
        "loss": ", ".join(config.loss),
        "metrics": "; ".join(
            f"{stage}: {', '.join(getattr(config.metric, stage)) or 'none'}"
            for stage in parts.loaders
            if stage != PREDICT
        ),
        "goal": f"{goal.mode} {goal.metric}; early stop {stop}" if config.mode == "train" else "",
        "monitors": "; ".join(
            f"{n}: {m.mode} {m.metric}" for n, m in _given(config.checkpoint.monitors)
        ),
        "average": config.average["_target_"] if config.average else "",
        "frozen": "; ".join(_frozen(freeze) for _, freeze in _given(config.freeze)),
        "length": _length(config) if config.mode == "train" else "",
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }
    log.info(
        "%s", "\n".join(f"{name:9} {text}" for name, text in lines.items() if str(text).strip())
    )


def _several() -> str:
    return f"{world_size()} x " if world_size() > 1 else ""


def _given(named: dict[str, T | None]) -> list[tuple[str, T]]:
    return [(name, one) for name, one in named.items() if one is not None]


def _frozen(freeze: FreezeConfig) -> str:
    until = f" until epoch {freeze.until_epoch}" if freeze.until_epoch else ""
    return f"{freeze.parameters} from epoch {freeze.from_epoch}{until}"


def _length(config: Config) -> str:
    plan = make_limits(config)
    bounds = {"epochs": plan.max_epochs, "steps": plan.max_steps, "seconds": plan.max_seconds}
    return " or ".join(f"{count} {name}" for name, count in bounds.items() if count is not None)


def _described(stage: str, loader: BatchLoader | None) -> str:
    if loader is None:
        return f"{stage} none"
    if loader.num_samples is None:
        return f"{stage} an unknown number of samples"
    return f"{stage} {loader.num_samples:,} samples in {loader.num_batches:,} batches"
