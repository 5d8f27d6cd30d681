"""The batch size that learns fastest, found before training begins as if nothing had been."""

from __future__ import annotations

import gc
import logging
from pathlib import Path

import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from app.config.instantiate import Build
from app.config.resume import with_value
from app.config.schema import Job
from app.config.secrets import told
from app.distributed.collectives import world_size
from app.distributed.strategies import Parallel
from app.finders import find_batch_size
from app.learners import make_learning
from app.parts import make_parts
from app.runtime.errors import UserError
from app.runtime.files import write_text
from app.runtime.seed import random_state, set_random_state

log = logging.getLogger(__name__)


def with_found_size(job: Job, device: torch.device, folder: Path) -> Job:
    """The job with the size of the most samples per second among those that fit into memory.

    The parts of the search are its own; `find_batch_size.csv` and `config.yaml` are written.

    Args:
        job: With the smallest size.
        device: That it is to run on.
        folder: Of the run.

    Raises:
        UserError: There are several ranks, or not even the smallest size fits.
    """
    if world_size() > 1:
        raise UserError(
            f"trainer.batch_size_finder=True is for one device, but there are {world_size()} ranks"
        )
    random = random_state()
    size = _search(job, device, folder)
    set_random_state(random)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    log.info("trainer.batch_size_finder: training runs with data.batch_size=%d", size)
    found = with_batch_size(job, size)
    write_text(folder / "config.yaml", yaml.safe_dump(found.plain, sort_keys=False))
    return found


def _search(job: Job, device: torch.device, folder: Path) -> int:
    config, build = job.config, Build(job.trusted)
    parts = make_parts(config, build, device)
    parallel = Parallel(parts.task.model)
    parts.task.learning = make_learning(config, build, parts, parallel, scheduled=False)
    parts.freezing.apply(1)
    start, train = config.data.batch_size, parts.loaders["train"]
    return find_batch_size(parts.task, train, start, config.find, folder)


def with_batch_size(job: Job, size: int) -> Job:
    """The same job with batches of that size, and whatever else is made of it."""
    template = OmegaConf.create(job.template)
    assert isinstance(template, DictConfig)
    plain, changed = with_value(job.plain, template, "data.batch_size", size)
    return Job(told(plain), plain, OmegaConf.to_yaml(changed), job.trusted, job.differences)
