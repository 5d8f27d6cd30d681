"""Recorded steps: equal to steps that are not recorded, with real graphs where there is CUDA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from app.config.instantiate import Instantiator
from app.data.loaders import make_loader
from app.distributed.launch.select import choose_num_ranks
from app.experiment import run
from app.experiment.factory import make_components
from app.runtime.errors import UserError
from app.runtime.nested import Nested, iter_tensors
from app.training import supervised
from app.training.cuda_graph import GraphedStep
from app.training.events import Callback
from app.training.limits import TrainingLimits
from app.training.optim.lr_schedule import LRSchedule
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.precision import make_deterministic
from app.training.supervised import SupervisedTask
from app.training.task import StepOutput
from app.training.trainer import Trainer
from tests.support.runs import job_for
from tests.support.toy_training import DATA, X, Y, make_mlp
from tests.unit.training.test_trainer import SyncGuard

HAS_CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")


class RerunningStep(GraphedStep):
    """Stands in for a graph where there is no CUDA: a replay calls the recorded function again.

    As a graph does, it reads the tensors of the recorded batch and the learning rates on the
    device, fills the same tensors, and leaves everything on the host as it is.
    """

    num_replays = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, self.rerun)

    def rerun(self, function: Callable[[], Nested]) -> tuple[Nested, Callable[[], None]]:
        results, groups = function(), self.wrapper.optimizer.param_groups

        def replay() -> None:
            type(self).num_replays += 1
            kept = self.wrapper.host_state()
            for group, lr in zip(groups, self.lrs, strict=True):
                group["lr"] = lr.item()
            with torch.enable_grad():
                new = function()
            self.wrapper.restore_host_state(kept)
            for old, value in zip(iter_tensors(results), iter_tensors(new), strict=True):
                old.copy_(value)

        return results, replay


def train(folder: Path, graphed: bool, optimizer: Callable[..., torch.optim.Optimizer]) -> Trainer:
    """Train two epochs of batches of 24 samples and a shorter one, with a decaying rate."""
    torch.manual_seed(0)
    task = SupervisedTask(make_mlp(), nn.CrossEntropyLoss())
    own = optimizer(task.model.parameters())
    decay = torch.optim.lr_scheduler.ExponentialLR(own, 0.5)  # rates that float32 has exactly
    wrapper = OptimWrapper(own, LRSchedule(own, decay), batch_size=24, tracks_grad_norm=True)
    task.prepare_training(OptimWrapperDict(wrapper))
    if graphed:
        task.use_cuda_graph()
    trainer = Trainer(task, TrainingLimits(max_epochs=2), folder)
    trainer.fit(make_loader(DATA, 24, shuffle=True))
    return trainer


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.25, momentum=0.5, fused=True)  # type: ignore[arg-type]


def adamw(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 2**-6, fused=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_recorded_steps_are_bitwise_equal(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: Callable[..., torch.optim.Optimizer],
) -> None:
    monkeypatch.setattr(supervised, "GraphedStep", RerunningStep)
    monkeypatch.setattr(RerunningStep, "num_replays", 0)
    plain, graphed = (train(tmp_path / str(g), g, optimizer) for g in (False, True))
    assert len(DATA) % 24
    assert RerunningStep.num_replays == 2 * (len(DATA) // 24)  # the shorter batch is not replayed
    for ours, theirs in zip(
        graphed.task.parameters().values(), plain.task.parameters().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    for row, expected in zip(graphed.state.history, plain.state.history, strict=True):
        same = [k for k in expected if k not in ("epoch_time", "samples/s")]
        assert [row[k] for k in same] == [expected[k] for k in same]
    assert graphed.optimizers.steps == plain.optimizers.steps
    assert graphed.optimizers.lrs() == plain.optimizers.lrs()


def test_recording_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "GraphedStep", RerunningStep)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    task = SupervisedTask(model, nn.CrossEntropyLoss())
    wrapper = OptimWrapper(sgd(model.parameters()))
    task.prepare_training(OptimWrapperDict(wrapper))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = [dict(group) for group in wrapper.optimizer.param_groups]
    task.use_cuda_graph()
    task.prepare_steps(lambda _: (torch.randn(8, 4), torch.arange(8) % 3))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert all(not t.any() for state in wrapper.optimizer.state.values() for t in state.values())
    assert [dict(group) for group in wrapper.optimizer.param_groups] == options
    assert wrapper.steps == 0


def test_step_is_recorded_again_for_other_trained_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervised, "GraphedStep", RerunningStep)
    task = SupervisedTask(make_mlp(), nn.CrossEntropyLoss())
    task.prepare_training(OptimWrapperDict(OptimWrapper(adamw(task.model.parameters()))))
    task.use_cuda_graph()
    batches: list[int] = []

    def first(count: int) -> tuple[Tensor, Tensor]:
        batches.append(count)
        return (X[:8], Y[:8])

    first_weight = next(iter(task.parameters().values())).requires_grad_(False)
    for _ in range(2):
        task.prepare_steps(first)
    first_weight.requires_grad_(True)
    task.prepare_steps(first)
    assert len(batches) == 2
    before = first_weight.clone()
    task.train_step((X[:8], Y[:8]))
    assert not torch.equal(first_weight, before)


def test_step_is_recorded_again_for_other_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "GraphedStep", RerunningStep)
    task = SupervisedTask(make_mlp(), nn.CrossEntropyLoss())
    task.prepare_training(OptimWrapperDict(OptimWrapper(sgd(task.model.parameters()))))
    task.use_cuda_graph()
    assert task.graphed_step is not None
    task.prepare_steps(lambda _: (X[:8], Y[:8]))
    assert task.graphed_step.is_ready
    task.optimizer.optimizer.param_groups[0]["momentum"] = 0.25
    assert not task.graphed_step.is_ready


class OwnStep(SupervisedTask):
    def train_step(self, batch: Nested) -> StepOutput:
        return super().train_step(batch)


def test_steps_that_cannot_be_recorded_are_refused() -> None:
    plain = SupervisedTask(make_mlp(), nn.CrossEntropyLoss())
    slow = torch.optim.AdamW(plain.model.parameters(), foreach=True)
    plain.prepare_training(OptimWrapperDict(OptimWrapper(slow)))
    with pytest.raises(UserError, match="AdamW has no fused kernels"):
        plain.use_cuda_graph()
    with pytest.raises(UserError, match="OwnStep has a train_step of its own"):
        OwnStep(make_mlp(), nn.CrossEntropyLoss()).use_cuda_graph()


def test_schedule_of_momentum_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "GraphedStep", RerunningStep)
    task = SupervisedTask(make_mlp(), nn.CrossEntropyLoss())
    optimizer = sgd(task.model.parameters())
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 100)
    task.prepare_training(OptimWrapperDict(OptimWrapper(optimizer, LRSchedule(optimizer, cycle))))
    task.use_cuda_graph()
    with pytest.raises(UserError, match="cycle_momentum=false"):
        task.prepare_steps(lambda _: (X[:8], Y[:8]))


def test_run_without_cuda_is_refused_before_it_starts() -> None:
    job = job_for("model=mlp", "trainer.cuda_graph=true", "trainer.accelerator=cpu")
    with pytest.raises(UserError, match="needs a CUDA device, and this run uses cpu"):
        choose_num_ranks(job.config, multirun=False)


GPU_RUNS = {
    "mlp": ("model=mlp", "trainer.precision=fp32", "optimizer.lr=0.0009765625"),
    "cnn": ("model=cnn", "trainer.precision=fp32", "optimizer.lr=0.0009765625"),
    "bf16": ("model=cnn", "trainer.precision=bf16", "optimizer.lr=0.0009765625"),
    "dropout": ("model=alexnet", "optimizer=sgd", "optimizer.lr=0.015625"),
}


def fit_on_cuda(folder: Path, *overrides: str, callback: Callback | None = None) -> Trainer:
    job, device = job_for(*overrides), torch.device("cuda")
    make_deterministic(job.config.trainer.deterministic)
    instantiator = Instantiator(job.trusted)
    parts = make_components(job.config, instantiator, device)
    trainer = run.make_trainer(job, instantiator, parts, callback or Callback(), folder)
    trainer.fit(parts.loaders["train"], parts.loaders.get("valid"))
    return trainer


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", GPU_RUNS)
def test_graph_on_cuda_trains_as_without_it(tmp_path: Path, name: str) -> None:
    options = (
        *GPU_RUNS[name],
        *("trainer.max_epochs=2", "scheduler=constant", "scheduler.warmup_steps=0"),
        *("data.batch_size=96", "trainer.limit_train_batches=12", "trainer.limit_valid_batches=1"),
        f"trainer.deterministic={'false' if name == 'dropout' else 'true'}",
    )
    tables = []
    for graph in ("false", "true"):
        trainer = fit_on_cuda(tmp_path / graph, *options, f"trainer.cuda_graph={graph}")
        assert isinstance(trainer.task, SupervisedTask)
        assert (trainer.task.graphed_step is not None) == (graph == "true")
        table = pd.DataFrame(trainer.state.history)
        tables.append(table.drop(columns=["epoch_time", "samples/s"]))
    if name == "dropout":  # its random numbers are others
        assert abs(tables[0]["loss_mean"] - tables[1]["loss_mean"]).max() < 0.1
    else:
        pd.testing.assert_frame_equal(tables[0], tables[1], check_exact=False, rtol=1e-5)


@pytest.mark.gpu
@needs_cuda
def test_graph_on_cuda_ends_training_at_nan(tmp_path: Path) -> None:
    options = ("model=mlp", "optimizer=sgd", "optimizer.lr=1e30", "trainer.max_epochs=1")
    trainer = fit_on_cuda(tmp_path, *options, "trainer.cuda_graph=true", "scheduler=constant")
    assert trainer.outcome == "diverged"
    assert all(t.isfinite().all() for t in trainer.task.parameters().values())


@pytest.mark.gpu
@needs_cuda
def test_graph_on_cuda_never_synchronizes(tmp_path: Path) -> None:
    options = ("model=mlp", "trainer.limit_train_batches=60", "trainer.max_epochs=1")
    fit_on_cuda(tmp_path, *options, "trainer.cuda_graph=true", callback=SyncGuard(60))
