"""Build the callbacks of a job."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from app.config.instantiate import Instantiator
from app.config.schema import Config, Job
from app.experiment.factory import Components
from app.experiment.optimizer_parts import trained_parameters, without_implementation
from app.runtime.errors import UserError
from app.training.events import Callback
from app.training.model_summary import (
    Summary,
    optimizer_state_bytes,
    summarize_model,
)


def make_callbacks(
    job: Job, instantiator: Instantiator, folder: Path, components: Components
) -> list[Callback]:
    """Build the callbacks of the configuration.

    Raises:
        UserError: A target does not build a `Callback`.
    """
    offers = {
        "folder": folder,
        "model": components.task.model,
        "config": job.plain,
        "paths": components.paths,
        "summarize": partial(make_summary, instantiator, components),
    }
    callbacks = instantiator.build_all("callbacks", job.config.callbacks, **offers)
    for name, callback in callbacks.items():
        if not isinstance(callback, Callback):
            raise UserError(f"callbacks.{name} is not an app.training.events.Callback")
    return [*callbacks.values(), *_make_profiler(job.config, folder)]


def _make_profiler(config: Config, folder: Path) -> list[Callback]:
    steps = config.trainer.profile
    if not steps or config.mode != "train":
        return []
    from app.callbacks.profiler import Profiler

    return [Profiler(folder) if steps is True else Profiler(folder, steps)]


def make_summary(instantiator: Instantiator, components: Components) -> Summary:
    """Measure the model, and the memory of the optimizers that train it."""
    states = []
    for part in (part for parts in components.optimizer_parts.values() for part in parts):
        parameters = [parameter for group in part.groups for parameter in group["params"]]
        build = partial(instantiator, part.key, without_implementation(part.node))
        states.append(optimizer_state_bytes(build, parameters))
    known = [size for size in states if size is not None]
    total = sum(known) if len(known) == len(states) else None
    trained = trained_parameters(components.task, components.freezing)
    return summarize_model(components.task, components.loaders["train"], trained, total)
