"""What one rank does: build the parts, then train, validate or test."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app.batches import STAGES
from app.callbacks.callback import Callback, Callbacks
from app.checkpoint import BEST, find_checkpoint, load_checkpoint, load_weights
from app.config.build import Build
from app.config.schema import Config, Job
from app.data.loaders import Batches
from app.device import choose_device, describe_device, make_deterministic
from app.distributed import rank
from app.history import best
from app.parts import Parts, make_callbacks, make_optimization, make_parts, make_plan
from app.state import TrainState
from app.status import Status, versions
from app.trainer import Trainer

log = logging.getLogger(__name__)


def execute(job: Job, folder: Path) -> float | None:
    """Runs what the configuration says.

    Args:
        job: The configuration, checked.
        folder: Of the run, there already.

    Returns:
        The goal's best value, where training measured one.

    Raises:
        UserError: The user must put something right; `status.json` says so, too.
    """
    config, build = job.config, Build(job.trusted)
    device = choose_device(config.trainer.accelerator)
    make_deterministic(config.trainer.deterministic)
    about = {key: job.plain[key] for key in ("mode", "ckpt", "name", "tags", "notes", "seed")}
    status = Status(folder, about, config.goal, device)
    with status.recorded(), _watchers(config, build, status, folder) as callbacks:
        parts = make_parts(config, build, device)
        report(config, parts, folder)
        if config.mode == "train":
            return train(job, build, parts, callbacks, folder)
        evaluate(job, parts, callbacks, folder)
        return None


@contextmanager
def _watchers(config: Config, build: Build, status: Status, folder: Path) -> Iterator[Callback]:
    """Those who watch, told of the end however it comes; nobody watches in ranks other than 0."""
    callbacks = Callbacks([status, *make_callbacks(config, build, folder)] if rank() == 0 else [])
    try:
        yield callbacks
    finally:
        callbacks.on_run_end(status.history)


def train(job: Job, build: Build, parts: Parts, callbacks: Callback, folder: Path) -> float | None:
    """Trains, then tests the best; gives the goal's best value."""
    config = job.config
    task, loaders = parts.task, parts.loaders
    task.optimization = make_optimization(config, build, parts)
    state = TrainState(task.model, task.optimization, folder, job)
    trainer = Trainer(
        task, state, callbacks, config.goal, make_plan(config), config.seed, parts.device
    )
    trainer.fit(loaders["train"], loaders.get("valid"))
    found = best(state.history, config.goal)
    if found is None:
        log.warning("%s was never a number: the last weights are kept as best", config.goal.metric)
        state.save_best()
    tested_epoch = found.epoch if found else state.epoch
    log.info("the best weights are those of epoch %d", tested_epoch)
    if "test" in loaders:
        file = folder / "checkpoints" / BEST
        load_weights(task.model, load_checkpoint(file).model, str(file))
        trainer.run_stage("test", tested_epoch, loaders["test"])
    log.info("everything is in %s", folder)
    return found.value if found else None


def evaluate(job: Job, parts: Parts, callbacks: Callback, folder: Path) -> None:
    """Measures a checkpoint on the stage that the mode names."""
    config = job.config
    assert config.ckpt is not None
    file = find_checkpoint(Path(config.ckpt))
    checkpoint = load_checkpoint(file)
    load_weights(parts.task.model, checkpoint.model, str(file))
    state = TrainState(parts.task.model, None, folder, job)
    trainer = Trainer(
        parts.task, state, callbacks, config.goal, make_plan(config), config.seed, parts.device
    )
    result = trainer.run_stage(config.mode, checkpoint.epoch, parts.loaders[config.mode])
    log.info("%s of %s: %s", config.mode, file, _numbers(result.row))
    log.info("everything is in %s", folder)


def _numbers(row: dict[str, Any]) -> str:
    hidden = ("epoch", "stage", "epoch_time", "samples/s", "loss_std")
    return ", ".join(f"{key} {value:.6g}" for key, value in row.items() if key not in hidden)


def report(config: Config, parts: Parts, folder: Path) -> None:
    """Says in the log what is about to run, so that a wrong assumption is seen at once."""
    model, goal = parts.task.model, config.goal
    weights = sum(parameter.numel() for parameter in model.parameters())
    stop = f"after {goal.patience} validations without a better value" if goal.patience else "off"
    wanted = STAGES if config.mode == "train" else (config.mode,)
    lines = {
        "run": f"{config.name} (mode {config.mode}, seed {config.seed})",
        "folder": folder,
        "notes": " ".join([*(f"[{tag}]" for tag in config.tags), config.notes]),
        "model": f"{config.model['_target_']}, {weights:,} parameters",
        "data": "; ".join(_described(stage, parts.loaders.get(stage)) for stage in wanted),
        "device": f"{describe_device(parts.device)}, {parts.task.precision.name}",
        "loss": ", ".join(config.loss),
        "metrics": "; ".join(
            f"{stage}: {', '.join(getattr(config.metric, stage)) or 'none'}"
            for stage in parts.loaders
        ),
        "goal": f"{goal.mode} {goal.metric}; early stop {stop}",
        "length": _length(config),
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }
    log.info(
        "%s", "\n".join(f"{name:9} {text}" for name, text in lines.items() if str(text).strip())
    )


def _length(config: Config) -> str:
    plan = make_plan(config)
    bounds = {"epochs": plan.max_epochs, "steps": plan.max_steps}
    return " or ".join(f"{count} {name}" for name, count in bounds.items() if count is not None)


def _described(stage: str, loader: Batches | None) -> str:
    if loader is None:
        return f"{stage} none"
    return f"{stage} {loader.num_samples:,} samples in {len(loader):,} batches"
