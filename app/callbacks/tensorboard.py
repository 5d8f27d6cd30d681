"""Log a run to TensorBoard."""

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
from app.callbacks.plots import draw_matrix
from app.config.schema import GoalConfig
from app.runtime.extras import import_extra
from app.runtime.folders import make_folder
from app.runtime.nested import Nested, iter_tensors
from app.training.accumulator import LoggedSteps, StageResult
from app.training.events import Callback, EpochEnd, StageStart, StepEnd
from app.training.history import History

if TYPE_CHECKING:
    import pandas as pd
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)
NON_METRIC_COLUMNS = ["epoch", "iter", "stage", "num_samples", "data_time", "iter_time"]
# Configuration keys that are logged as hyperparameters, with all keys below them
HPARAMS = ("optimizer", "scheduler", "model", "trainer", "data.batch_size", "seed")


class TensorBoard(Callback):
    """Write `tensorboard/`: `<stage>/<name>` by epoch and `<stage>_step/<name>` by iteration.

    With `trainer.valid_every_n_steps`, `<stage>/<name>` is by optimizer step.

    Iterations are written while the stage runs.

    Args:
        folder: Run folder.
        model: Model whose weights and graph are logged.
        config: Resolved configuration.
        steps: Whether to log the values of each iteration.
        histograms_every_n_epochs: Interval of the weight histograms; 0 disables them.
        images: Number of samples to show in each evaluated stage: the inputs, and the outputs if
            they are images or label maps.
        graph: Whether to log the graph of the model.
        hparams: Whether to log the main settings and results to the HParams page, which compares
            runs.

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
        import_extra("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder / "tensorboard"
        self.make_writer = partial(SummaryWriter, str(self.folder))
        self.model, self.config, self.goal = model, config, GoalConfig(**config["goal"])
        self.steps, self.images, self.hparams = steps, images, hparams
        self.histograms_every_n_epochs = histograms_every_n_epochs
        self.num_iterations: Counter[str] = Counter()  # of complete stages, by stage
        self.last_iteration = 0  # of the current stage that was logged
        self.samples = SampleBuffer(config, 0)
        self.graph_samples = SampleBuffer(config, 2 if graph else 0)

    def state_dict(self) -> dict[str, Any]:
        last = {"last": self.last_iteration} if self.last_iteration else {}
        return {"iterations": dict(self.num_iterations), **last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_iterations = Counter(state["iterations"])
        self.last_iteration = state.get("last", 0)

    @cached_property
    def writer(self) -> SummaryWriter:
        """Writer, created at first use: a callback that receives no events writes no file."""
        make_folder(self.folder)
        return self.make_writer()

    def on_stage_start(self, start: StageStart) -> None:
        is_evaluated = start.stage in ("valid", "test")
        self.samples = SampleBuffer(self.config, self.images if is_evaluated else 0)

    def on_step_end(self, step: StepEnd) -> None:
        self.samples.add(step)
        self.graph_samples.add(step)

    def on_steps_logged(self, logged: LoggedSteps) -> None:
        self._log_steps(logged.stage, logged.steps)
        self.writer.flush()

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        self._log_steps(result.stage, result.steps)
        if not result.is_complete:
            return
        self.num_iterations[result.stage] += len(result.steps)
        self.last_iteration = 0
        for name, value in row_metrics(result.row).items():
            self.writer.add_scalar(name, value, result.position)
        for name, array in result.arrays.items():
            if array.ndim == 2:
                figure = draw_matrix(array, f"{name}, {result.stage}, {result.point}")
                self.writer.add_figure(f"{result.stage}/{name}", figure, result.position)
        if not self.samples.is_empty:
            for name, images in self.samples.image_rows().items():
                self.writer.add_images(f"{result.stage}_images/{name}", images, result.position)
        if not self.graph_samples.is_empty:
            self._log_graph(self.graph_samples.batches[0][0])
            self.graph_samples = SampleBuffer(self.config, 0)

    def on_epoch_end(self, end: EpochEnd) -> None:
        interval = self.histograms_every_n_epochs
        if end.is_complete and interval and end.epoch % interval == 0:
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
            values = final_metrics(history, self.goal)
            metrics = {f"hparam/{name}": value for name, value in values.items()}
            make_folder(self.folder)  # fails if the run folder is gone; the writer would create it
            self.writer.add_hparams(_hparams(self.config), metrics, run_name=".")
        self.writer.close()

    def _log_steps(self, stage: str, steps: pd.DataFrame) -> None:
        """Log the iterations of the current stage that are not logged yet."""
        steps = steps[steps["iter"] > self.last_iteration]
        if not self.steps or steps.empty:
            return
        numbers = self.num_iterations[stage] + steps["iter"]
        for name in steps.columns.difference(NON_METRIC_COLUMNS):
            for number, value in zip(numbers, steps[name], strict=True):
                self.writer.add_scalar(f"{stage}_step/{name}", value, number)
        self.last_iteration = int(steps["iter"].iloc[-1])

    def _log_graph(self, inputs: Nested) -> None:
        devices = {tensor.device for tensor in iter_tensors(inputs) if tensor.is_cuda}
        try:
            with (
                warnings.catch_warnings(),
                redirect_stdout(io.StringIO()),
                torch.random.fork_rng(devices),
            ):
                warnings.simplefilter("ignore")
                # Trace a copy: tracing sets the mode of all modules to that of the root module.
                self.writer.add_graph(copy.deepcopy(self.model).eval(), inputs)
        except (RuntimeError, TypeError) as error:
            log.warning("cannot log the graph of the model: %s", str(error).splitlines()[0])


def _hparams(config: dict[str, Any]) -> dict[str, float | str]:
    return {
        key: value if isinstance(value, (int, float)) else str(value)
        for key, value in flatten(config).items()
        if any(f"{key}.".startswith(f"{prefix}.") for prefix in HPARAMS)
    }
