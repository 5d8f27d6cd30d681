"""The run as TensorBoard shows it."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections import Counter
from contextlib import redirect_stdout
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from app.callbacks.image_grids import SampleBuffer
from app.callbacks.log_values import final_metrics, flatten, row_metrics
from app.callbacks.plots import matrix
from app.config.schema import GoalConfig
from app.runtime.errors import UserError
from app.runtime.nested import Nested, tensors
from app.training.accumulator import StageResult
from app.training.events import Callback, EpochEnd, StageStart, StepEnd
from app.training.history import History

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)
NOT_DRAWN = ["epoch", "iter", "stage", "num_samples", "iter_time"]
COMPARED = ("optimizer", "scheduler", "model", "trainer", "data.batch_size", "seed")


class TensorBoard(Callback):
    """Writes `tensorboard/`: by epochs `<stage>/<name>`, by iterations `<stage>_step/<name>`.

    Args:
        folder: Of the run.
        model: Its weights and its graph are shown.
        config: The whole configuration.
        steps: Draws curves over the iterations, too.
        histograms_every_n_epochs: Of the weights; 0: never.
        images: How many samples of each evaluated stage are shown, as inputs and, where the
            outputs are images or label maps, outputs.
        graph: Shows the operations of the model.
        hparams: Shows the run beside others, with its main settings and results.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        config: dict[str, Any],
        steps: bool = True,
        histograms_every_n_epochs: int = 0,
        images: int = 0,
        graph: bool = False,
        hparams: bool = True,
    ) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError('needs TensorBoard: pip install -e ".[tensorboard]"') from error
        self.create = partial(SummaryWriter, str(folder / "tensorboard"))
        self.model, self.config, self.goal = model, config, GoalConfig(**config["goal"])
        self.steps, self.images, self.hparams = steps, images, hparams
        self.histograms_every_n_epochs = histograms_every_n_epochs
        self.done: Counter[str] = Counter()  # iterations of each stage
        self.samples = SampleBuffer(config, 0)
        self.traced = SampleBuffer(config, 2 if graph else 0)

    def state_dict(self) -> dict[str, Any]:
        return {"iterations": dict(self.done)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = Counter(state["iterations"])

    @cached_property
    def writer(self) -> SummaryWriter:
        """Made when there is something to write, which is in the rank alone that is watched."""
        return self.create()

    def on_stage_start(self, start: StageStart) -> None:
        evaluated = start.stage in ("valid", "test")
        self.samples = SampleBuffer(self.config, self.images if evaluated else 0)

    def on_step_end(self, step: StepEnd) -> None:
        self.samples.add(step)
        self.traced.add(step)

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        if not result.is_whole:
            return
        for name, value in row_metrics(result.row).items():
            self.writer.add_scalar(name, value, result.epoch)
        if self.steps:
            self._draw_steps(result)
        for name, array in result.arrays.items():
            if array.ndim == 2:
                figure = matrix(array, f"{name}, {result.stage}, epoch {result.epoch}")
                self.writer.add_figure(f"{result.stage}/{name}", figure, result.epoch)
        if not self.samples.is_empty:
            for name, pictures in self.samples.pictures().items():
                self.writer.add_images(f"{result.stage}_images/{name}", pictures, result.epoch)
        if not self.traced.is_empty:
            self._draw_graph(self.traced.kept[0][0])
            self.traced = SampleBuffer(self.config, 0)

    def on_epoch_end(self, end: EpochEnd) -> None:
        every = self.histograms_every_n_epochs
        if every and end.epoch % every == 0:
            for name, weights in self.model.named_parameters():
                finite = weights.detach().float().flatten()
                finite = finite[finite.isfinite()]
                if len(finite):
                    self.writer.add_histogram(f"weights/{name}", finite, end.epoch)
        self.writer.flush()

    def on_run_end(self, history: History) -> None:
        if not history:
            return
        if self.hparams:
            found = final_metrics(history, self.goal)
            metrics = {f"hparam/{name}": value for name, value in found.items()}
            self.writer.add_hparams(_compared(self.config), metrics, run_name=".")
        self.writer.close()

    def _draw_steps(self, result: StageResult) -> None:
        first = self.done[result.stage] + 1
        self.done[result.stage] += len(result.steps)
        for name in result.steps.columns.difference(NOT_DRAWN):
            for step, value in enumerate(result.steps[name], first):
                self.writer.add_scalar(f"{result.stage}_step/{name}", value, step)

    def _draw_graph(self, inputs: Nested) -> None:
        """Of a copy, since tracing a model puts all its modules into the mode of the whole."""
        devices = {tensor.device for tensor in tensors(inputs) if tensor.is_cuda}
        try:
            with (
                warnings.catch_warnings(),
                redirect_stdout(io.StringIO()),
                torch.random.fork_rng(devices),
            ):
                warnings.simplefilter("ignore")
                self.writer.add_graph(copy.deepcopy(self.model).eval(), inputs)
        except (RuntimeError, TypeError) as error:
            log.warning("the model's graph cannot be drawn: %s", str(error).splitlines()[0])


def _compared(config: dict[str, Any]) -> dict[str, float | str]:
    return {
        key: value if isinstance(value, (int, float)) else str(value)
        for key, value in flatten(config).items()
        if any(f"{key}.".startswith(f"{part}.") for part in COMPARED)
    }
