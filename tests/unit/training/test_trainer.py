"""The loop, the steps and learning: against plain PyTorch, and without reading the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.callbacks.progress import Progress
from app.config.instantiate import Instantiator
from app.config.schema import Job
from app.data.mnist import mnist
from app.data.split import split
from app.distributed.strategies import SingleDevice
from app.experiment import run
from app.experiment.factory import Components, make_components, make_optimizers
from app.runtime.errors import UserError
from app.runtime.seed import derive_seed, seed_everything
from app.training.accumulator import StageAccumulator, StageResult
from app.training.events import Callback, Callbacks, EpochEnd, StageStart, StepEnd
from app.training.history import History
from app.training.optim.lr_schedule import LRSchedule
from app.training.optim.optim_wrapper import OptimWrapper
from app.training.trainer import Trainer
from tests.support.runs import job_for

CPU = torch.device("cpu")
SMALL = ("model=mlp", "trainer.max_epochs=1", "data.batch_size=100")
SEGMENTATION = (
    *("data=shapes", "data.image_size=32", "data.batch_size=16", "model=unet", "model.width=4"),
    *("metric=segmentation", "goal.metric=dice"),
)


class Listener(Callback):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.ends: list[EpochEnd] = []
        self.results: list[StageResult] = []

    def on_stage_start(self, start: StageStart) -> None:
        self.told.append(f"start {start.stage} {start.epoch}")

    def on_stage_end(self, result: StageResult, history: History) -> None:
        assert history[-1] is result.row
        self.results.append(result)
        self.told.append(f"end {result.stage} {result.epoch}")

    def on_epoch_end(self, end: EpochEnd) -> None:
        self.ends.append(end)


def make_trainer(job: Job, folder: Path, *callbacks: Callback) -> tuple[Trainer, Components]:
    parts = make_components(job.config, Instantiator(job.trusted), CPU)
    return run.make_trainer(
        job, Instantiator(job.trusted), parts, Callbacks(callbacks), folder
    ), parts


def fit(folder: Path, *words: str) -> tuple[Trainer, Listener]:
    listener = Listener()
    trainer, parts = make_trainer(job_for(*words), folder, listener)
    trainer.fit(parts.loaders["train"], parts.loaders.get("valid"))
    return trainer, listener


def test_one_epoch_is_that_of_a_plain_loop_bit_for_bit(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, *SMALL, "seed=3", "optimizer=sgd", "scheduler=constant")

    seed_everything(3, "model")
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    images, labels = split({"train": mnist(train=True)}, 5000, None, 0)["train"].tensors  # type: ignore[attr-defined]
    order = torch.Generator().manual_seed(derive_seed(3, "order", 1))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.0005
    )
    for batch in torch.randperm(55_000, generator=order).split(100):
        x = (images[batch].float() / 255 - 0.1307) / 0.3081
        loss = F.cross_entropy(model(x), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    ours, theirs = list(trainer.task.model.parameters()), list(model.parameters())
    assert len(ours) == len(theirs) == 4
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Unreadable(Tensor):
    """A tensor that cannot be read by the host, as if that took forever."""

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
    "words",
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
def test_a_step_reads_nothing_back(tmp_path: Path, words: tuple[str, ...]) -> None:
    job = job_for(*SMALL, "trainer.limit_train_batches=3", "+optimizer.fused=true", *words)
    trainer, parts = make_trainer(job, tmp_path)
    assert trainer.optimizers.finite_check is not None
    trainer.optimizers.finite_check.syncs = False  # as on a CUDA device
    trainer.task.model.train()
    batches = parts.loaders["train"].epoch(1)
    trainer.task.train_step(next(batches))  # the very first step is read
    rows, progress = StageAccumulator(trainer.task.metrics["train"], CPU), Progress()
    progress.on_stage_start(StageStart("train", 1, 3, 300))
    for x, y in batches:
        batch = (x.as_subclass(Unreadable), y.as_subclass(Unreadable))
        step = trainer.task.train_step(batch)
        assert isinstance(step.values["loss"].value, Unreadable)  # type: ignore[union-attr]
        trainer.averaging.update(1, trainer.optimizers.steps)
        rows.add(step.values, {**step.host_values, **trainer.optimizers.lrs()})
        progress.on_step_end(StepEnd("train", 1, len(y), batch, step.outputs))
        rows.add(trainer.task.eval_step("train", batch).values)
    with pytest.raises(AssertionError, match="reads the device"):
        rows.flush()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_step_does_not_wait_for_the_gpu() -> None:
    job = job_for("model=alexnet", "data.batch_size=100", "trainer.limit_train_batches=5")
    cuda = torch.device("cuda")
    parts = make_components(job.config, Instantiator(), cuda)
    parts.task.optimizers = make_optimizers(
        job.config, Instantiator(), parts, SingleDevice(parts.task.model)
    )
    rows = StageAccumulator(parts.task.metrics["train"], cuda)
    batches = parts.loaders["train"].epoch(1)
    rows.add(parts.task.train_step(next(batches)).values)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            rows.add(parts.task.train_step(batch).values, parts.task.optimizers.lrs())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert rows.result("train", 1).row["total_samples"] == 500


# ---- when things happen


def test_validation_comes_when_due_and_after_the_last_epoch(tmp_path: Path) -> None:
    few = ("trainer.limit_train_batches=1", "trainer.limit_valid_batches=1")
    _, listener = fit(
        tmp_path, "model=mlp", "trainer.max_epochs=5", "trainer.valid_every_n_epochs=2", *few
    )
    ends = [told.removeprefix("end ") for told in listener.told if told.startswith("end")]
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
def test_max_steps_counts_steps_of_the_optimizer(
    tmp_path: Path, accumulate: int, batches: list[int]
) -> None:
    trainer, listener = fit(
        tmp_path,
        "model=mlp",
        "trainer.max_epochs=null",
        "trainer.max_steps=7",
        "trainer.limit_train_batches=4",
        "trainer.limit_valid_batches=1",
        f"trainer.accumulate_grad_batches={accumulate}",
    )
    found = [len(result.steps) for result in listener.results if result.stage == "train"]
    assert found == batches
    assert trainer.optimizers.steps == 7


def test_early_stop_and_best_follow_the_goal(tmp_path: Path) -> None:
    trainer, listener = fit(
        tmp_path,
        "model=mlp",
        "trainer.max_epochs=9",
        "optimizer=sgd",
        "optimizer.lr=1e-12",  # nothing is learned
        "scheduler=constant",
        "goal.metric=loss",
        "goal.mode=min",
        "goal.patience=2",
        "goal.min_delta=0.001",
        "trainer.limit_train_batches=1",
        "trainer.limit_valid_batches=2",
    )
    assert [end.epoch for end in listener.ends] == [1, 2, 3]
    assert (tmp_path / "checkpoints" / "best.pt").is_file()
    assert trainer.state.epoch == 3


def test_threshold_of_a_training_metric_without_validation(tmp_path: Path) -> None:
    _, listener = fit(
        tmp_path,
        "model=mlp",
        "trainer.max_epochs=9",
        "data.split.valid=null",
        "goal.metric=train/accuracy",
        "goal.threshold=0.01",
        "trainer.limit_train_batches=3",
    )
    assert [told for told in listener.told if "valid" in told] == []
    assert [end.epoch for end in listener.ends] == [1]


def test_sanity_validation_finds_what_is_wrong_before_the_first_epoch(tmp_path: Path) -> None:
    listener = Listener()
    trainer, parts = make_trainer(job_for(*SMALL), tmp_path, listener)
    x, y = parts.loaders["valid"].first(2)

    class Broken:
        num_samples = 2
        num_batches = 1

        def first(self, count: int) -> tuple[Tensor, Tensor]:
            return x[:count], y[:count]

        def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:  # noqa: ARG002
            yield x[:, :, :5], y

    with pytest.raises(UserError, match=r"model: MLP cannot take .*shapes cannot be multiplied"):
        trainer.fit(parts.loaders["train"], Broken())
    assert listener.told == []


def test_sanity_validation_changes_nothing(tmp_path: Path) -> None:
    words = ("model=cnn", "trainer.max_epochs=1", "trainer.limit_train_batches=3")
    with_, _ = fit(tmp_path / "a", *words, "trainer.sanity_valid_batches=2")
    without, _ = fit(tmp_path / "b", *words, "trainer.sanity_valid_batches=0")
    one, other = with_.task.model.state_dict(), without.task.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


class Gambler(Callback):
    """Draws random numbers at every chance."""

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        torch.rand(3)


def test_an_epochs_randomness_depends_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    words = ("model=mlp", "model.dropout=0.5", "trainer.max_epochs=2", "data.batch_size=50")
    job = job_for(*words, "trainer.limit_train_batches=3", "trainer.limit_valid_batches=1")
    learned = []
    for callbacks in ([], [Gambler()]):
        trainer, parts = make_trainer(job, tmp_path, *callbacks)
        trainer.fit(parts.loaders["train"], parts.loaders["valid"])
        learned.append(list(trainer.task.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*learned, strict=True))


def test_overfitting_trains_and_validates_on_the_same_few_batches(tmp_path: Path) -> None:
    trainer, listener = fit(
        tmp_path, "model=mlp", "debug=overfit", "data.batch_size=20", "trainer.max_epochs=40"
    )
    assert {result.row["total_samples"] for result in listener.results} == {60}
    assert float(trainer.state.history[-1]["accuracy"]) == 1.0


# ---- learning


def optimization(model: nn.Module, **options: Any) -> OptimWrapper:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = LRSchedule(optimizer, None, per_epoch=False, warmup_steps=0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return OptimWrapper(optimizer, schedule, scaler, batch_size=4, **options)


def learned_from(sizes: list[int], **options: Any) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.rand(sum(sizes), 3).double(), torch.randint(0, 2, (sum(sizes),))
    learning = optimization(model, **options)
    for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
        learning.step(F.cross_entropy(model(a), b), len(b))
    learning.flush()
    return model, x, y


@pytest.mark.parametrize("sizes", [[4, 4, 4], [4, 4, 1], [4, 2]])
def test_accumulated_batches_learn_as_one_batch_of_all_samples(sizes: list[int]) -> None:
    several, _, _ = learned_from(sizes, accumulate=3)
    one, _, _ = learned_from([sum(sizes)])
    torch.testing.assert_close(several.weight, one.weight)  # float64, other order of sums


def test_gradient_clipping_by_norm_and_by_value() -> None:
    start = nn.Linear(3, 2).double()
    torch.manual_seed(0)
    start = nn.Linear(3, 2).double()
    by_norm, _, _ = learned_from([4], clip_norm=1e-3)
    steps = [(a - b) / 0.1 for a, b in zip(start.parameters(), by_norm.parameters(), strict=True)]
    norm = torch.cat([step.flatten() for step in steps]).norm()
    torch.testing.assert_close(norm.item(), 1e-3, rtol=1e-4, atol=0)  # torch adds 1e-6 to the norm
    by_value, _, _ = learned_from([4], clip_value=1e-3)
    largest = ((start.weight - by_value.weight) / 0.1).abs().max()
    torch.testing.assert_close(largest.item(), 1e-3)


def rates(
    make: Callable[[torch.optim.Optimizer], Any],
    steps: int,
    warmup: int = 0,
    per_epoch: bool = False,
) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = LRSchedule(optimizer, make(optimizer), per_epoch, warmup)
    found = []
    for step in range(1, steps + 1):
        found.append(schedule.lr)
        optimizer.step()
        schedule.on_step_end()
        if step % 2 == 0:
            schedule.on_epoch_end(0.5)
    return found


def test_schedules_per_step_and_per_epoch() -> None:
    halve = lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5)  # noqa: E731
    assert rates(halve, 4) == [1.0, 0.5, 0.25, 0.125]
    assert rates(halve, 5, per_epoch=True) == [1.0, 1.0, 0.5, 0.5, 0.25]


def test_warm_up_multiplies_any_schedule() -> None:
    halve = lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5)  # noqa: E731
    assert rates(lambda o: None, 5, warmup=4) == [0.25, 0.5, 0.75, 1.0, 1.0]  # noqa: ARG005
    assert rates(halve, 4, warmup=2) == [0.5, 0.5, 0.25, 0.125]
    assert rates(halve, 5, warmup=4, per_epoch=True) == [0.25, 0.5, 0.375, 0.5, 0.25]


def test_plateau_is_told_the_goal() -> None:
    plateau = lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, "max", 0.1, patience=1)  # noqa: E731
    assert rates(plateau, 8, per_epoch=True)[-2:] == pytest.approx([0.1, 0.1])


def test_a_schedule_set_to_auto_ends_with_the_run(tmp_path: Path) -> None:
    few = ("trainer.limit_train_batches=5", "trainer.limit_valid_batches=1", "model=mlp")
    for words in (("scheduler=cosine", "scheduler.warmup_steps=2"), ("scheduler=onecycle",)):
        _, listener = fit(tmp_path, *few, "trainer.max_epochs=3", *words)
        used = [rate for r in listener.results if r.stage == "train" for rate in r.steps["lr"]]
        assert len(used) == 15
        assert max(used) > 0.9e-3
        assert min(used[2:]) == used[-1] < 0.02e-3
