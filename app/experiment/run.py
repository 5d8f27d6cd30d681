"""What each rank runs: build the components, then train, evaluate, predict, export or tune."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch

from app.callbacks.prediction_files import PredictionFileWriter
from app.callbacks.tables import truncate_to_history
from app.config.instantiate import Instantiator
from app.config.schema import AUTO, Config, FreezeConfig, Job
from app.data.batch import BatchLoader
from app.data.datamodule import active_stages, needs_statistics
from app.data.images import without_ghostscript
from app.distributed.collectives import rank, world_size
from app.distributed.strategies import SingleDevice
from app.experiment.callbacks import make_callbacks
from app.experiment.environment import Environment, describe_code
from app.experiment.export import export
from app.experiment.factory import (
    Components,
    make_averaging,
    make_components,
    make_limits,
    make_strategy,
)
from app.experiment.optimizers import make_optimizers
from app.experiment.status import RUN_INFO_KEYS, StatusWriter
from app.experiment.tuner import (
    apply_batch_size_finder,
    find_batch_size,
    find_learning_rate,
    prepare_tuning,
)
from app.losses.weighted_sum import logit_outputs
from app.runtime.device import choose_device, describe_device
from app.runtime.errors import StorageError, UserError
from app.runtime.files import write_csv
from app.runtime.memory import keep_freed_memory
from app.runtime.nested import Key, pick
from app.runtime.signals import StopSignal
from app.runtime.wait_policy import adaptive_wait_policy
from app.training.checkpoint.initial_weights import InitialWeights
from app.training.checkpoint.rotation import find_checkpoint
from app.training.detection import DetectionTask
from app.training.events import Callback, Callbacks
from app.training.history import best_epoch
from app.training.nonfinite import NonFiniteEvent, NonFiniteStats
from app.training.optim.group_table import describe_groups, describe_optimizers, group_table
from app.training.optim.optim_wrapper import OptimWrapperDict
from app.training.precision import make_deterministic, set_matmul_precision
from app.training.pruning import Pruning
from app.training.stage_loop import PREDICT
from app.training.supervised import SupervisedTask
from app.training.task import Task
from app.training.trainer import Trainer

log = logging.getLogger(__name__)
INITIAL_WEIGHTS_FILE = "initial_weights.csv"
T = TypeVar("T")


def execute(
    job: Job, folder: Path, stop: StopSignal | None = None, local_rank: int = 0
) -> float | None:
    """Run this rank's share of a job in the mode of its configuration.

    Args:
        job: The validated job.
        folder: The run folder, which exists.
        stop: Set by signals that ask the training to stop early.
        local_rank: The index of this rank on its machine.

    Returns:
        The best value of the goal; None if the mode is not `train` or there is no finite value.

    Raises:
        UserError: The user has to change something; the error is also in `status.json`.
        TrainingInterrupted: The training stopped early, as `stop` asked.
    """
    config, instantiator = job.config, Instantiator(job.trusted)
    device = choose_device(config.trainer.accelerator, config.trainer.devices, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    make_deterministic(config.trainer.deterministic)
    set_matmul_precision(config.trainer.matmul_precision)
    on_cpu = device.type == "cpu"
    keeps_memory = on_cpu and keep_freed_memory()
    wait_policy = adaptive_wait_policy() if on_cpu else nullcontext(False)
    is_resumed = config.resume not in (None, AUTO)
    environment = Environment(job, device) if rank() == 0 else None
    status = make_status(job, folder, device, environment)
    recording = status.recording() if rank() == 0 else nullcontext()
    with without_ghostscript(), recording, wait_policy as adapts:
        if config.mode == "train" and config.trainer.batch_size_finder and not is_resumed:
            job = apply_batch_size_finder(job, device, folder)
            config = job.config
        components = make_components(config, instantiator, device)
        record = record_environment(job, folder, environment, components)
        speed = {
            "memory": "freed memory is kept for the next step" if keeps_memory else "",
            "threads": "those that wait sleep while other processes need the cores"
            if adapts
            else "",
            "compile": "the first steps compile the model, which can take minutes"
            if config.trainer.compile
            else "",
        }
        log_run_header(config, components, folder, speed | record)
        record_initial_weights(components.initial, folder)
        if config.mode in TUNERS:
            prepare_tuning(config, instantiator, components)
            TUNERS[config.mode](config, components, folder)
            return None
        callbacks = make_run_callbacks(job, instantiator, components, status)
        with closing_callbacks(callbacks, status):
            trainer = make_trainer(
                job, instantiator, components, callbacks, folder, stop, status.nonfinite
            )
            if config.mode == "train":
                if is_resumed:
                    trainer.resume(Path(str(config.resume)))
                if rank() == 0:
                    truncate_to_history(folder, trainer.state.history)
                value = train(trainer, components)
                status.set_outcome(trainer.outcome)
                return value
            MODES[config.mode](trainer, components, config)
            return None


def check_samples(job: Job) -> None:
    """Build the components of a job and send two samples of each stage through them.

    The optimizers are built, too. Nothing is written: a cache of images is not built, nor are its
    pixels measured.

    Raises:
        UserError: A component cannot be built, or the components do not fit together.
    """
    config = job.config
    device = choose_device(config.trainer.accelerator, config.trainer.devices)
    data, trainer = config.data, replace(config.trainer, compile=False)
    if data.cache is not None:
        normalize = None if needs_statistics(data) else data.normalize
        data = replace(data, cache=None, normalize=normalize)
    config = replace(config, mode="train", data=data, trainer=trainer)
    with without_ghostscript():
        instantiator = Instantiator(job.trusted)
        components = make_components(config, instantiator, device)
        if "train" in components.loaders:
            strategy = SingleDevice(components.task.model)
            make_optimizers(config, instantiator, components, strategy)


def make_status(
    job: Job, folder: Path, device: torch.device, environment: Environment | None
) -> StatusWriter:
    """Build the writer of `status.json`, which only rank 0 uses."""
    config = job.config
    run_info = {key: job.plain[key] for key in RUN_INFO_KEYS}
    fields = {} if environment is None else environment.status_fields
    is_resumed = config.resume not in (None, AUTO)
    return StatusWriter(folder, run_info, config.goal, device, fields, is_resumed)


def record_environment(
    job: Job, folder: Path, environment: Environment | None, components: Components
) -> dict[str, str]:
    """Write `environment.json` on rank 0, and return the lines about it for the log."""
    if environment is None:
        return {}
    source = {stage: node for stage, node in job.plain["data"]["source"].items() if node}
    initial = components.initial.record if components.initial else None
    record = environment.write(folder, source, components.data, initial, components.teacher)
    versions = ", ".join(f"{name} {number}" for name, number in environment.versions.items())
    return {"code": describe_code(record), "versions": versions}


def record_initial_weights(initial: InitialWeights | None, folder: Path) -> None:
    """Log which initial weights were taken on rank 0, and write them to a table."""
    if initial is None or rank() > 0:
        return
    log.info("%s", initial.describe())
    write_csv(folder / INITIAL_WEIGHTS_FILE, pd.DataFrame(map(asdict, initial.tensors)))


def make_run_callbacks(
    job: Job, instantiator: Instantiator, components: Components, status: StatusWriter
) -> Callback:
    """Build the callbacks, which exist on rank 0 only; the first of them writes the status."""
    if rank() > 0:
        return Callback()
    return Callbacks([status, *make_callbacks(job, instantiator, status.folder, components)])


@contextmanager
def closing_callbacks(callbacks: Callback, status: StatusWriter) -> Iterator[None]:
    """Tell the callbacks when the `with` block, and so the run, ends."""
    try:
        yield
    except BaseException:
        with suppress(OSError, StorageError):  # must not hide the error that ended the run
            callbacks.on_run_end(status.history)
        raise
    callbacks.on_run_end(status.history)


def make_trainer(
    job: Job,
    instantiator: Instantiator,
    components: Components,
    callbacks: Callback,
    folder: Path,
    stop: StopSignal | None = None,
    nonfinite_stats: NonFiniteStats | None = None,
) -> Trainer:
    """Build the training loop; in `mode=train` also the strategy, optimizers and averaging."""
    config, averaging = job.config, None
    strategy = SingleDevice(components.task.model)
    if config.mode == "train":
        strategy = make_strategy(config, components)
        optimizers = make_optimizers(config, instantiator, components, strategy)
        report_groups(optimizers, folder)
        components.task.prepare_training(optimizers, strategy)
        if config.trainer.cuda_graph:
            use_cuda_graph(components.task)
        averaging = make_averaging(config, instantiator, components.task.model)
    return Trainer(
        components.task,
        make_limits(config),
        folder,
        config.goal,
        callbacks,
        config.seed,
        components.device,
        averaging,
        components.freezing,
        {name: monitor for name, monitor in config.checkpoint.monitors.items() if monitor},
        job,
        strategy,
        stop,
        Pruning(config.sweep.trial, config.goal),
        nonfinite_stats,
    )


def use_cuda_graph(task: Task) -> None:
    """Let a task record its training steps.

    Raises:
        UserError: It cannot.
    """
    if not isinstance(task, SupervisedTask):
        raise UserError(
            f"trainer.cuda_graph=True: {type(task).__name__} is not derived from SupervisedTask"
        )
    task.use_cuda_graph()


def report_groups(optimizers: OptimWrapperDict, folder: Path) -> None:
    """Log the optimizers; if there are several groups, log them and write a table of them."""
    if rank() > 0:
        return
    log.info("%-9s %s", "optimizer", describe_optimizers(optimizers))
    table = group_table(optimizers)
    if table["number"].nunique() > 1:
        log.info("parameter groups:\n%s", describe_groups(table))
        write_csv(folder / "parameter_groups.csv", table)


def train(trainer: Trainer, components: Components) -> float | None:
    """Train, test the best weights, and return the best value of the goal."""
    trainer.fit(components.loaders["train"], components.loaders.get("valid"))
    state, goal = trainer.state, trainer.goal
    best = best_epoch(state.history, goal)
    if best is None:
        log.warning("%s was never finite: saving the last weights as the best", goal.metric)
        state.save_best()
    epoch = state.load_best_weights()
    kind = "best" if best and state.point == best.point else "last"
    log.info("loaded the %s weights, from %s", kind, state.point)
    if "test" in components.loaders and trainer.outcome != "pruned":
        trainer.evaluate(components.loaders["test"], "test", epoch)
    log.info("results are in %s", state.folder)
    if trainer.outcome == "diverged":
        log.warning("%s", describe_divergence(trainer))
    return best.value if best else None


def describe_divergence(trainer: Trainer) -> str:
    """Return what made training diverge, and two things to try."""
    first = trainer.steps.nonfinite.stats.first
    reason = f": {NonFiniteEvent(**first)}" if first else ""
    rates = ", ".join(f"{name}={rate:g}" for name, rate in trainer.optimizers.lrs().items())
    hint = f"a lower learning rate ({rates} at the end), or trainer.gradient_clip_norm=1.0"
    return f"training has diverged{reason}; try {hint}"


def evaluate(trainer: Trainer, components: Components, config: Config) -> None:
    """Evaluate a checkpoint on the stage that the mode names."""
    file = load_ckpt_weights(trainer, config)
    result = trainer.run_stage(config.mode, trainer.state.epoch, components.loaders[config.mode])
    log.info("%s results of %s: %s", config.mode, file, _format_metrics(result.row))
    log.info("results are in %s", trainer.state.folder)


def predict(trainer: Trainer, components: Components, config: Config) -> None:
    """Write the predictions of a checkpoint."""
    file, task = load_ckpt_weights(trainer, config), components.task
    loader = components.loaders[PREDICT]
    logits = logit_keys(task)
    paths, class_names = components.paths.get(PREDICT), config.data.class_names
    assert class_names != AUTO
    names = paths if config.predict.images else None
    files = PredictionFileWriter(
        trainer.state.folder,
        logits,
        config.predict.format,
        names,
        paths if names is None else None,
        class_names,
        config.data.colors,
    )
    has_labels = isinstance(task, SupervisedTask) and names is None
    has_targets = has_labels or isinstance(task, DetectionTask)  # which have the sizes of files
    for batch, outputs in trainer.predictions(loader):
        files.add(outputs, pick(batch, task.targets) if has_targets else None)  # type: ignore[attr-defined]
    written = files.close()
    log.info("predictions of %s are in %s", file, ", ".join(map(str, written)))


def export_model(trainer: Trainer, components: Components, config: Config) -> None:
    """Export the model of a checkpoint."""
    file, model = load_ckpt_weights(trainer, config), components.task.model
    assert config.data.input_shape != AUTO
    sample = torch.rand(2, *config.data.input_shape)
    names = config.data.class_names
    assert names != AUTO
    path = export(model.cpu().eval(), sample, config.export.format, trainer.state.folder, names)
    log.info("exported the model of %s to %s", file, path)


MODES = {"valid": evaluate, "test": evaluate, "predict": predict, "export": export_model}


def load_ckpt_weights(trainer: Trainer, config: Config) -> Path:
    """Load the weights of the checkpoint that `ckpt` names, and return its file."""
    assert config.ckpt is not None
    file = find_checkpoint(Path(config.ckpt))
    trainer.state.epoch = trainer.state.load_weights(file)
    return file


def logit_keys(task: Task) -> list[Key]:
    """Return which outputs are class logits; none if the task overrides `predict_step`."""
    overridden = type(task).predict_step is not SupervisedTask.predict_step
    return [] if overridden or not isinstance(task, SupervisedTask) else logit_outputs(task.loss)


def tune_lr(config: Config, components: Components, folder: Path) -> None:
    """Try learning rates and suggest the one at which the loss falls fastest."""
    suggestion = find_learning_rate(
        components.task, components.loaders["train"], config.find, folder
    )
    log.info("suggested learning rate: optimizer.lr=%.3g", suggestion)
    log.info("the loss at each learning rate is in %s", folder / "find_lr.csv")


def tune_batch_size(config: Config, components: Components, folder: Path) -> None:
    """Try batch sizes and suggest the fastest one that fits into memory."""
    suggestion = find_batch_size(
        components.task,
        components.loaders["train"],
        config.data.batch_size,
        config.find,
        folder,
    )
    log.info("suggested batch size: data.batch_size=%d", suggestion)
    log.info("the speed of each batch size is in %s", folder / "find_batch_size.csv")


TUNERS = {"find_lr": tune_lr, "find_batch_size": tune_batch_size}


def _format_metrics(row: dict[str, Any]) -> str:
    hidden = ("epoch", "step", "stage", "epoch_time", "samples/s", "loss_std")
    return ", ".join(f"{key} {value:.6g}" for key, value in row.items() if key not in hidden)


def log_run_header(
    config: Config, components: Components, folder: Path, environment: dict[str, str]
) -> None:
    """Log a summary of what is about to run, so that wrong settings are noticed at once."""
    model = components.task.model
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    fields = {
        "run": f"{config.name} (mode {config.mode}, seed {config.seed})",
        "folder": folder,
        "notes": " ".join([*(f"[{tag}]" for tag in config.tags), config.notes]),
        "model": f"{config.model['_target_']}, {num_parameters:,} parameters",
        "task": config.task["_target_"],
        "teacher": components.teacher["checkpoint"] if components.teacher else "",
        "data": "; ".join(
            _describe_data(stage, components.loaders.get(stage)) for stage in active_stages(config)
        ),
        "device": _describe_devices(components),
        "loss": ", ".join(config.loss),
        "metrics": "; ".join(
            f"{stage}: {', '.join(getattr(config.metric, stage)) or 'none'}"
            for stage in components.loaders
            if stage != PREDICT
        ),
        "goal": _describe_goal(config) if config.mode == "train" else "",
        "monitors": "; ".join(
            f"{name}: {monitor.mode} {monitor.metric}"
            for name, monitor in _not_none(config.checkpoint.monitors)
        ),
        "average": config.average["_target_"] if config.average else "",
        "frozen": "; ".join(_describe_freeze(freeze) for _, freeze in _not_none(config.freeze)),
        "length": _describe_length(config) if config.mode == "train" else "",
        **environment,
    }
    lines = [f"{name:9} {text}" for name, text in fields.items() if str(text).strip()]
    log.info("%s", "\n".join(lines))


def _describe_data(stage: str, loader: BatchLoader | None) -> str:
    if loader is None:
        return f"no {stage} data"
    if loader.num_samples is None:
        return f"{stage} of unknown length"
    return f"{stage} {loader.num_samples:,} samples in {loader.num_batches:,} batches"


def _describe_devices(components: Components) -> str:
    count = f"{world_size()} x " if world_size() > 1 else ""
    return f"{count}{describe_device(components.device)}, {components.task.precision.name}"


def _describe_goal(config: Config) -> str:
    goal = config.goal
    patience = f"after {goal.patience} validations without improvement" if goal.patience else "off"
    return f"{goal.mode} {goal.metric}; early stopping {patience}"


def _describe_freeze(freeze: FreezeConfig) -> str:
    until = f" until epoch {freeze.until_epoch}" if freeze.until_epoch else ""
    return f"{freeze.parameters} from epoch {freeze.from_epoch}{until}"


def _describe_length(config: Config) -> str:
    limits = make_limits(config)
    counts = {"epochs": limits.max_epochs, "steps": limits.max_steps, "seconds": limits.max_seconds}
    return " or ".join(f"{count} {unit}" for unit, count in counts.items() if count is not None)


def _not_none(nodes: dict[str, T | None]) -> list[tuple[str, T]]:
    return [(name, node) for name, node in nodes.items() if node is not None]
