"""How a job is to be started, and on how many devices."""

from __future__ import annotations

from pathlib import Path

from app.config.schema import Config, Job
from app.distributed.launch.environment import ClusterEnvironment
from app.distributed.launch.worker import RankFunction
from app.runtime.errors import UserError
from app.runtime.signals import StopSignal

SINGLE_DEVICE_MODES = (
    "export",
    "find_lr",
    "find_batch_size",
)  # modes that have no use for several devices


def choose_num_ranks(config: Config, multirun: bool) -> int:
    """How many processes are to be started here; 0 where the job runs in this one.

    Raises:
        UserError: The devices are not there, or not with this launcher.
    """
    from app.runtime.device import choose_device, count_devices

    trainer = config.trainer
    size = count_devices(trainer.accelerator, trainer.devices)
    size = 1 if config.mode in SINGLE_DEVICE_MODES else size
    if size > 1:
        _check_search(config, f"trainer.devices={trainer.devices!r} are {size}")
    if config.launch == "inline" and size > 1:
        raise UserError(
            f"launch='inline' is one device, but trainer.devices={trainer.devices!r}; "
            "allowed: auto, local"
        )
    if config.launch == "local" or size > 1:
        return size
    # A process of its own for each job: the memory of the device is free again after it.
    on_cuda = choose_device(trainer.accelerator, trainer.devices).type == "cuda"
    return 1 if multirun and on_cuda and config.launch == "auto" else 0


def check_environment(config: Config, world: ClusterEnvironment) -> None:
    """The devices that the configuration asks for are those that were started.

    Raises:
        UserError: They are not.
    """
    devices = config.trainer.devices
    started = f"{world.launcher} has started {world.size} ranks"
    if config.launch not in ("auto", world.launcher):
        raise UserError(
            f"launch={config.launch!r}, but {world.launcher} has started this; type it as launch="
            f"{config.launch} on the command line"
        )
    if isinstance(devices, int) and devices != world.size:
        raise UserError(f"trainer.devices={devices}, but {started}; allowed: {world.size}, null")
    if isinstance(devices, list) and len(devices) != world.local_size:
        raise UserError(
            f"trainer.devices={devices} are {len(devices)}, but {started}, {world.local_size} of "
            "them on this machine; allowed: as many ids, null"
        )
    if world.size > 1 and config.mode in SINGLE_DEVICE_MODES:
        raise UserError(f"mode={config.mode!r} runs on one device, but {started}")
    if world.size > 1:
        _check_search(config, started)
    if config.data.batch_size < world.size:
        raise UserError(
            f"data.batch_size={config.data.batch_size} is for all devices together, but {started}"
        )


def _check_search(config: Config, several: str) -> None:
    if config.mode == "train" and config.trainer.batch_size_finder:
        raise UserError(f"trainer.batch_size_finder=True searches on one device, but {several}")


def launch_inline(function: RankFunction, job: Job, folder: Path) -> float | None:
    """Runs it here; gives what the function gives."""
    stop = StopSignal()
    with stop.installed():
        return function(job, folder, stop, 0)
