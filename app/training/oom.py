"""Too little memory in a step, as a user can do something about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from app.config.schema import Config
from app.distributed.collectives import rank, world_size
from app.runtime.device import is_out_of_memory, peak_memory
from app.runtime.errors import UserError

MIB = 2**20


class OOMReporter:
    """Names what was under way when there was too little memory.

    Args:
        device: That the steps run on.
        config: Of the run; None where the trainer was built from Python.
    """

    def __init__(self, device: torch.device, config: Config | None) -> None:
        self.device, self.config = device, config

    @contextmanager
    def guard_step(self, stage: str, epoch: int, step: int) -> Iterator[None]:
        """A step.

        Raises:
            UserError: There is too little memory for it.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            one = f" of rank {rank()}" if world_size() > 1 else ""
            raise UserError(
                f"out of memory in {stage}, epoch {epoch}, step {step}{one}: {self._size(stage)}"
                f"{self._peak()}; try {self._ways_out(stage)} "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            ) from error

    def _size(self, stage: str) -> str:
        if self.config is None:
            return ""
        data = self.config.data
        measured = stage != "train" and data.eval_batch_size is not None
        more = f", data.eval_batch_size={data.eval_batch_size}" if measured else ""
        return f"data.batch_size={data.batch_size}{more}, "

    def _peak(self) -> str:
        peaks = peak_memory(self.device)
        told = f"at most {peaks.get('peak_memory_bytes', 0) / MIB:,.0f} MiB in use by the process"
        if "peak_device_memory_bytes" in peaks:
            told += f", {peaks['peak_device_memory_bytes'] / MIB:,.0f} MiB of the device"
        return f"{told} so far"

    def _ways_out(self, stage: str) -> str:
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
