"""The training loop: against plain PyTorch, without reading the device, and when things happen."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from app.callbacks.progress import Progress
from app.config.instantiate import Instantiator
from app.config.schema import GoalConfig
from app.data.loaders import make_loader
from app.data.mnist import mnist
from app.data.split import split_dataset
from app.distributed.strategies import SingleDevice
from app.experiment import run
from app.experiment.callbacks import make_callbacks
from app.experiment.factory import make_components
from app.experiment.optimizers import make_optimizers
from app.runtime.errors import UserError
from app.runtime.host_copy import HostCopy
from app.runtime.nested import Nested
from app.runtime.seed import derive_seed, seed_everything
from app.training import accumulator as accumulator_module
from app.training.accumulator import StageAccumulator, StageResult
from app.training.events import Callback, Callbacks, StageStart, StepEnd
from app.training.history import History, Point
from app.training.limits import TrainingLimits
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.supervised import SupervisedTask
from app.training.task import StepOutput
from app.training.trainer import Trainer
from tests.support.fitting import EventRecorder, build_trainer, fit
from tests.support.runs import job_for
from tests.support.toy_training import DATA, X, Y, make_mlp, make_trainer

CPU = torch.device("cpu")
SMALL = ("model=mlp", "trainer.max_epochs=1", "data.batch_size=100")
SEGMENTATION = (
    *("data=shapes", "data.image_size=32", "data.batch_size=16", "model=unet", "model.width=4"),
    *("metric=segmentation", "goal.metric=dice"),
)


@pytest.mark.parametrize(
    ("overrides", "is_fused"), [((), True), (("+optimizer.fused=false",), None)]
)
def test_fit_one_epoch_is_bitwise_equal_to_plain_pytorch(
    tmp_path: Path, overrides: tuple[str, ...], is_fused: bool | None
) -> None:
    few = ("data.split.valid=52000", "trainer.limit_valid_batches=1")  # leave 8,000 for training
    options = (*few, "seed=3", "optimizer=sgd", "scheduler=constant", *overrides)
    trainer, _ = fit(tmp_path, *SMALL, *options)

    seed_everything(3, "model")
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    images, labels = split_dataset({"train": mnist(train=True)}, 52_000, None, 0)["train"].tensors  # type: ignore[attr-defined]
    order = torch.Generator().manual_seed(derive_seed(3, "order", 1))
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=0.05,
        momentum=0.9,
        nesterov=True,
        weight_decay=0.0005,
        fused=is_fused,
    )
    for batch in torch.randperm(8_000, generator=order).split(100):
        x = (images[batch].float() / 255 - 0.1307) / 0.3081
        loss = F.cross_entropy(model(x), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    ours, theirs = list(trainer.task.model.parameters()), list(model.parameters())
    assert len(ours) == len(theirs) == 4
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Unreadable(Tensor):
    """A tensor that raises if the host reads it."""

    READING: ClassVar = {
        Tensor.item,
        Tensor.tolist,
        Tensor.cpu,
        Tensor.numpy,
        Tensor.__bool__,
        Tensor.__float__,
        Tensor.__int__,
        Tensor.__repr__,
        Tensor.__format__,
        Tensor.__array__,
    }

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in cls.READING:
            raise AssertionError(f"{func.__name__} reads the device")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("metric/single@metric.train=[accuracy,f1,auroc,confusion_matrix]",),
        ("trainer.gradient_clip_norm=1.0", "trainer.accumulate_grad_batches=2"),
        ("trainer.gradient_clip_value=1.0", "scheduler=onecycle"),
        ("trainer.gradient_norm=true", "trainer.zero_non_finite_gradients=true", "average=ema"),
        (
            "task=mixup",
            "loss.cross_entropy.weight={_target_: app.losses.weights.UncertaintyWeight}",
        ),
        (*SEGMENTATION, "loss=dice_ce"),
        (
            *SEGMENTATION,
            "loss=focal",
            "metric/single@metric.train=[hd95,dice_per_class]",
        ),
    ],
)
def test_train_step_never_reads_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    job = job_for(*SMALL, "trainer.limit_train_batches=4", "+optimizer.fused=true", *overrides)
    trainer, components = build_trainer(job, tmp_path)
    trainer.optimizers.finite_check.defers = True  # as on a CUDA device
    trainer.task.model.train()
    batches = components.loaders["train"].epoch(1)
    while trainer.optimizers.steps == 0:  # the first step is always read
        trainer.task.train_step(next(batches))
    monkeypatch.setattr(HostCopy, "is_ready", False)  # as before a CUDA device is done
    accumulator = StageAccumulator(trainer.task.metrics["train"], CPU, flush_every=2)
    accumulator.next_log = 0.0
    progress = Progress()
    progress.on_stage_start(StageStart("train", Point(1), 3, 300))
    for x, y in islice(batches, 2):
        batch = (x.as_subclass(Unreadable), y.as_subclass(Unreadable))
        output = trainer.task.train_step(batch)
        assert isinstance(output.values["loss"].value, Unreadable)  # type: ignore[union-attr]
        trainer.steps.averaging.update(1, trainer.optimizers.steps)
        accumulator.add(output.values, {**output.host_values, **trainer.optimizers.lrs()})
        progress.on_step_end(StepEnd("train", 1, len(y), batch, output.outputs))
        accumulator.add(trainer.task.eval_step("train", batch).values)
        assert not accumulator.has_news()
    assert len(accumulator.in_flight) == 2  # copied every two steps, but not waited for
    with pytest.raises(AssertionError, match="reads the device"):
        accumulator.flush()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_train_step_on_cuda_never_synchronizes() -> None:
    job = job_for("model=alexnet", "data.batch_size=100", "trainer.limit_train_batches=5")
    cuda = torch.device("cuda")
    components = make_components(job.config, Instantiator(), cuda)
    components.task.prepare_training(
        make_optimizers(job.config, Instantiator(), components, SingleDevice(components.task.model))
    )
    accumulator = StageAccumulator(components.task.metrics["train"], cuda, flush_every=2)
    accumulator.next_log = 0.0
    batches = components.loaders["train"].epoch(1)
    lrs = components.task.optimizers.lrs()
    accumulator.add(components.task.train_step(next(batches)).values, lrs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            accumulator.add(
                components.task.train_step(batch).values, components.task.optimizers.lrs()
            )
            if accumulator.has_news():
                accumulator.log("train", 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert accumulator.result("train", Point(1)).row["total_samples"] == 500


class SyncGuard(Callback):
    """Makes waiting for CUDA an error between the second step and the end of the epoch."""

    def __init__(self, last_step: int) -> None:
        self.last_step, self.values = last_step, []

    def on_step_end(self, step: StepEnd) -> None:
        is_guarded = step.stage == "train" and 2 <= step.step < self.last_step
        torch.cuda.set_sync_debug_mode("error" if is_guarded else "default")
        self.values += [dict(step.so_far)] if is_guarded else []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_epoch_on_cuda_shows_values_and_never_synchronizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SECONDS_TO_FIRST_LOG", "SECONDS_BETWEEN_LOGS"):
        monkeypatch.setattr(accumulator_module, name, 0.0)
    job = job_for("model=alexnet", "trainer.limit_train_batches=60", "trainer.log_every_n_steps=5")
    instantiator, guard = Instantiator(job.trusted), SyncGuard(60)
    components = make_components(job.config, instantiator, torch.device("cuda"))
    others = make_callbacks(job, instantiator, tmp_path, components)
    callbacks = Callbacks([guard, *others])
    trainer = run.make_trainer(job, instantiator, components, callbacks, tmp_path)
    trainer.run_stage("train", 1, components.loaders["train"], is_training=True)
    assert {"loss", "accuracy"} <= guard.values[-1].keys()


def test_fit_validates_every_n_epochs_and_after_the_last(tmp_path: Path) -> None:
    few = ("trainer.limit_train_batches=1", "trainer.limit_valid_batches=1")
    _, recorder = fit(
        tmp_path, "model=mlp", "trainer.max_epochs=5", "trainer.valid_every_n_epochs=2", *few
    )
    ends = [event.removeprefix("end ") for event in recorder.events if event.startswith("end")]
    assert ends == [
        "train 1",
        "train 2",
        "valid 2",
        "train 3",
        "train 4",
        "valid 4",
        "train 5",
        "valid 5",
    ]


@pytest.mark.parametrize(("accumulate", "batches"), [(1, [4, 3]), (2, [4, 4, 4, 2])])
def test_max_steps_counts_optimizer_steps(
    tmp_path: Path, accumulate: int, batches: list[int]
) -> None:
    trainer, recorder = fit(
        tmp_path,
        "model=mlp",
        "trainer.max_epochs=null",
        "trainer.max_steps=7",
        "trainer.limit_train_batches=4",
        "trainer.limit_valid_batches=1",
        f"trainer.accumulate_grad_batches={accumulate}",
    )
    lengths = [len(result.steps) for result in recorder.results if result.stage == "train"]
    assert lengths == batches
    assert trainer.optimizers.steps == 7


def test_patience_without_improvement_ends_training(tmp_path: Path) -> None:
    trainer, recorder = fit(
        tmp_path,
        "model=mlp",
        "trainer.max_epochs=9",
        "optimizer=sgd",
        "optimizer.lr=1e-12",  # so that nothing improves
        "scheduler=constant",
        "goal.metric=loss",
        "goal.mode=min",
        "goal.patience=2",
        "goal.min_delta=0.001",
        "trainer.limit_train_batches=1",
        "trainer.limit_valid_batches=2",
    )
    assert [end.epoch for end in recorder.epoch_ends] == [1, 2, 3]
    assert (tmp_path / "checkpoints" / "best.safetensors").is_file()
    assert trainer.state.epoch == 3


def test_threshold_of_train_metric_ends_training_without_validation(tmp_path: Path) -> None:
    _, recorder = fit(
        tmp_path,
        "model=mlp",
        "trainer.max_epochs=9",
        "data.split.valid=null",
        "goal.metric=train/accuracy",
        "goal.threshold=0.01",
        "trainer.limit_train_batches=3",
    )
    assert [event for event in recorder.events if "valid" in event] == []
    assert [end.epoch for end in recorder.epoch_ends] == [1]


def test_sanity_check_with_unusable_valid_data_fails_before_the_first_epoch(tmp_path: Path) -> None:
    recorder = EventRecorder()
    trainer, components = build_trainer(job_for(*SMALL), tmp_path, recorder)
    x, y = components.loaders["valid"].first(2)

    class BrokenLoader:
        num_samples = 2
        num_batches = 1

        def first(self, count: int) -> tuple[Tensor, Tensor]:
            return x[:count], y[:count]

        def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:  # noqa: ARG002
            yield x[:, :, :5], y

    with pytest.raises(UserError, match=r"model: MLP cannot take .*shapes cannot be multiplied"):
        trainer.fit(components.loaders["train"], BrokenLoader())
    assert recorder.events == []


def test_sanity_check_does_not_change_training(tmp_path: Path) -> None:
    overrides = ("model=cnn", "trainer.max_epochs=1", "trainer.limit_train_batches=3")
    overrides = (*overrides, "trainer.limit_valid_batches=2", "data.batch_size=16")
    checked, _ = fit(tmp_path / "a", *overrides, "trainer.sanity_valid_batches=2")
    unchecked, _ = fit(tmp_path / "b", *overrides, "trainer.sanity_valid_batches=0")
    one, other = checked.task.model.state_dict(), unchecked.task.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


class RandomCallback(Callback):
    """Draws random numbers after each stage."""

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        torch.rand(3)


def test_callback_that_draws_random_numbers_does_not_change_training(tmp_path: Path) -> None:
    overrides = ("model=mlp", "model.dropout=0.5", "trainer.max_epochs=2", "data.batch_size=50")
    job = job_for(*overrides, "trainer.limit_train_batches=3", "trainer.limit_valid_batches=1")
    parameters = []
    for name, callbacks in {"without": [], "with": [RandomCallback()]}.items():
        trainer, components = build_trainer(job, tmp_path / name, *callbacks)
        trainer.fit(components.loaders["train"], components.loaders["valid"])
        parameters.append(list(trainer.task.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*parameters, strict=True))


def test_debug_overfit_trains_and_validates_on_the_same_batches(tmp_path: Path) -> None:
    trainer, recorder = fit(
        tmp_path, "model=mlp", "debug=overfit", "data.batch_size=20", "trainer.max_epochs=40"
    )
    assert {result.row["total_samples"] for result in recorder.results} == {60}
    assert float(trainer.state.history[-1]["accuracy"]) == 1.0


def test_evaluate_on_train_data_does_not_change_the_model(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_mlp(), 1)
    trainer.fit(make_loader(DATA, 32))
    before = copy.deepcopy(trainer.task.model.state_dict())
    row = trainer.evaluate(make_loader(DATA, 32), "train")
    assert row["stage"].tolist() == ["train"]
    for name, tensor in trainer.task.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_fit_after_the_last_epoch_trains_no_more(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_mlp(), 2)
    first = trainer.fit(make_loader(DATA, 32))
    assert trainer.fit(make_loader(DATA, 32)).equals(first)
    assert trainer.state.epoch == 2


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """A plain function as a metric."""
    return (outputs.argmax(1) == targets).float().mean()


def test_fit_with_goal_that_is_not_measured_fails_before_training(tmp_path: Path) -> None:
    stages: list[str] = []

    class StageRecorder(Callback):
        def on_step_end(self, step: StepEnd) -> None:
            stages.append(step.stage)

    task = SupervisedTask(nn.Linear(3, 2), F.cross_entropy, {"valid": {"accuracy": accuracy}})
    task.prepare_training(
        OptimWrapperDict(OptimWrapper(torch.optim.SGD(task.model.parameters(), 0.1)))
    )
    goal = GoalConfig("acuracy", "max")
    limits = TrainingLimits(max_epochs=1)
    trainer = Trainer(task, limits, tmp_path, goal=goal, callbacks=StageRecorder())
    with pytest.raises(UserError, match=r"'acuracy' is not measured .*did you mean 'accuracy'"):
        trainer.fit(make_loader(DATA, 10), make_loader(DATA, 10))
    assert stages == []


def test_fit_without_train_batches_is_rejected(tmp_path: Path) -> None:
    empty = TensorDataset(X[:0], Y[:0])
    trainer = make_trainer(tmp_path, make_mlp(), 1)
    with pytest.raises(UserError, match="the train data has no batches"):
        trainer.fit(make_loader(empty, 10), make_loader(empty, 10))


class RandomEvalTask(SupervisedTask):
    """Adds random noise to the inputs in evaluation."""

    def eval_step(self, stage: str, batch: Nested) -> StepOutput:
        return super().eval_step(stage, (batch[0] + torch.randn(batch[0].shape), batch[1]))


def test_evaluate_draws_random_numbers_by_seed_stage_and_epoch_only(tmp_path: Path) -> None:
    task = RandomEvalTask(nn.Linear(3, 2), F.cross_entropy)
    data = make_loader(DATA, 10)

    def loss(seed: int, epoch: int) -> float:
        trainer = Trainer(task, TrainingLimits(max_epochs=1), tmp_path, seed=seed)
        torch.rand(epoch)
        return float(trainer.evaluate(data, "test", epoch)["loss_mean"][0])

    assert loss(0, 3) == loss(0, 3)
    assert len({loss(0, 3), loss(0, 4), loss(1, 3)}) == 3


def test_fit_with_min_epochs_does_not_stop_early_before_them(tmp_path: Path) -> None:
    goal = GoalConfig("loss", "min", threshold=100.0)

    def epochs(folder: str, min_epochs: int) -> int:
        trainer = make_trainer(tmp_path / folder, make_mlp(), goal=goal)
        trainer.limits = TrainingLimits(max_epochs=5, min_epochs=min_epochs)
        trainer.fit(make_loader(DATA, 32), make_loader(DATA, 32))
        assert trainer.has_finished_training()
        return trainer.state.epoch

    assert [epochs("a", 0), epochs("b", 3), epochs("c", 5)] == [1, 3, 5]
