"""Out-of-memory errors that tell the user what to change."""

from __future__ import annotations

import torch

from app.config.schema import Config
from app.distributed.collectives import rank, world_size
from app.runtime.device import is_out_of_memory, peak_memory
from app.runtime.errors import UserError

MIB = 2**20


class OOMReporter:
    """Turns out-of-memory errors in a step into errors that name the step and a way out.

    Args:
        device: Device that the steps run on.
        config: Configuration of the run; None if the trainer was built in Python.
    """

    def __init__(self, device: torch.device, config: Config | None) -> None:
        self.device, self.config = device, config

    def raise_if_out_of_memory(self, error: Exception, stage: str, epoch: int, step: int) -> None:
        """Raise an error that tells what to change if a step has run out of memory.

        Raises:
            UserError: The error of the step says so.
        """
        if not is_out_of_memory(error):
            return
        on_rank = f" of rank {rank()}" if world_size() > 1 else ""
        raise UserError(
            f"out of memory in {stage}, epoch {epoch}, step {step}{on_rank}: "
            f"{self._batch_sizes(stage)}{self._peak_memory()}; try {self._suggestion(stage)} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from error

    def _batch_sizes(self, stage: str) -> str:
        if self.config is None:
            return ""
        data = self.config.data
        is_eval = stage != "train" and data.eval_batch_size is not None
        eval_size = f", data.eval_batch_size={data.eval_batch_size}" if is_eval else ""
        return f"data.batch_size={data.batch_size}{eval_size}, "

    def _peak_memory(self) -> str:
        peaks = peak_memory(self.device)
        text = f"at most {peaks.get('peak_memory_bytes', 0) / MIB:,.0f} MiB in use by the process"
        if "peak_device_memory_bytes" in peaks:
            text += f", {peaks['peak_device_memory_bytes'] / MIB:,.0f} MiB of the device"
        return f"{text} so far"

    def _suggestion(self, stage: str) -> str:
        if self.config is None:
            return "smaller batches"
        data, trainer = self.config.data, self.config.trainer
        if stage != "train":
            half = max(1, (data.eval_batch_size or data.batch_size) // 2)
            return f"data.eval_batch_size={half}, trainer.precision=bf16"
        return (
            f"data.batch_size={max(1, data.batch_size // 2)} with "
            f"trainer.accumulate_grad_batches={2 * trainer.accumulate_grad_batches}, "
            "trainer.precision=bf16, mode=find_batch_size or trainer.batch_size_finder=true"
        )
