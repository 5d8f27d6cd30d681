"""Choose how a job is launched and on how many devices."""

from __future__ import annotations

from pathlib import Path

from app.config.schema import Config, Job
from app.distributed.launch.environment import ClusterEnvironment
from app.distributed.launch.worker import RankFunction
from app.runtime.errors import UserError
from app.runtime.folders import held_folder
from app.runtime.signals import StopSignal

SINGLE_DEVICE_MODES = ("export", "find_lr", "find_batch_size")


def choose_num_ranks(config: Config, multirun: bool) -> int:
    """Return how many processes to start; 0 to run the job in this process.

    Raises:
        UserError: The devices are not available, or not with this launcher.
    """
    from app.runtime.device import choose_device, count_devices

    trainer = config.trainer
    num_ranks = count_devices(trainer.accelerator, trainer.devices)
    kind = choose_device(trainer.accelerator, trainer.devices).type
    if trainer.cuda_graph and config.mode == "train" and kind != "cuda":
        raise UserError(
            f"trainer.cuda_graph=True needs a CUDA device, and this run uses {kind}; allowed: false"
        )
    num_ranks = 1 if config.mode in SINGLE_DEVICE_MODES else num_ranks
    if num_ranks > 1:
        _check_batch_size_finder(
            config, f"trainer.devices={trainer.devices!r} selects {num_ranks} devices"
        )
    if config.launch == "inline" and num_ranks > 1:
        raise UserError(
            f"launch='inline' runs on one device, but trainer.devices={trainer.devices!r}; "
            "allowed: auto, local"
        )
    if config.launch == "local" or num_ranks > 1:
        return num_ranks
    # In a sweep, each job on CUDA gets its own process, whose device memory is freed at its end.
    return 1 if multirun and kind == "cuda" and config.launch == "auto" else 0


def check_environment(config: Config, cluster: ClusterEnvironment) -> None:
    """Check that the ranks that torchrun or srun has started match the configuration.

    Raises:
        UserError: They do not match.
    """
    devices = config.trainer.devices
    started = f"{cluster.launcher} has started {cluster.world_size} ranks"
    if config.launch not in ("auto", cluster.launcher):
        raise UserError(
            f"launch={config.launch!r}, but {cluster.launcher} has started this process; pass "
            f"launch={config.launch} on the command line"
        )
    if isinstance(devices, int) and devices != cluster.world_size:
        raise UserError(
            f"trainer.devices={devices}, but {started}; allowed: {cluster.world_size}, null"
        )
    if isinstance(devices, list) and len(devices) != cluster.local_world_size:
        raise UserError(
            f"trainer.devices={devices} selects {len(devices)} devices, but {started}, "
            f"{cluster.local_world_size} of them on this machine; allowed: one id per rank of this "
            "machine, null"
        )
    if cluster.world_size > 1 and config.mode in SINGLE_DEVICE_MODES:
        raise UserError(f"mode={config.mode!r} runs on one device, but {started}")
    if cluster.world_size > 1:
        _check_batch_size_finder(config, started)
    if config.data.batch_size < cluster.world_size:
        raise UserError(
            f"data.batch_size={config.data.batch_size} is for all devices together, but {started}"
        )


def _check_batch_size_finder(config: Config, problem: str) -> None:
    if config.mode == "train" and config.trainer.batch_size_finder:
        raise UserError(f"trainer.batch_size_finder=True runs on one device, but {problem}")


def launch_inline(function: RankFunction, job: Job, folder: Path) -> float | None:
    """Run a job in this process; return the result of the function."""
    stop = StopSignal()
    with stop.installed(), held_folder(folder):
        return function(job, folder, stop, 0)
