"""Training and evaluation on several ranks, connected by gloo, match those on one rank.

Float32 sums are computed in another order, so losses and weights agree to an absolute tolerance of
1e-6 and a relative one of 1e-5; counts are equal.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from torchmetrics import classification as c
from torchmetrics.wrappers import LambdaInputTransformer

from app.config.instantiate import Instantiator
from app.data.batch import BatchLoader, BatchPreparer
from app.data.loaders import DataLoaderOptions, SampleLoader, TensorLoader, make_loader
from app.data.sampling import EpochSampler
from app.data.transform import transform_samples
from app.distributed.collectives import LazyAllReduceMax, local_slice, rank, world_size
from app.distributed.strategies import DDPStrategy, SingleDevice
from app.distributed.sync_batchnorm import convert_sync_batchnorm
from app.experiment import run
from app.experiment.factory import make_components
from app.experiment.run import execute
from app.metrics.stage_metrics import StageMetrics
from app.runtime.errors import UserError
from app.runtime.nested import Nested
from app.training.accumulator import StageResult
from app.training.checkpoint.train_state import gather_to_cpu
from app.training.events import Callback, StageStart, StepEnd
from app.training.history import History
from app.training.limits import TrainingLimits
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.supervised import SupervisedTask
from app.training.task import StepOutput, Task
from app.training.trainer import Trainer
from tests.support.rank_functions import run_on_ranks
from tests.support.runs import job_for

CPU = torch.device("cpu")
SHORT = (
    "trainer.max_epochs=2",
    "data.batch_size=50",
    "trainer.limit_train_batches=8",
    "trainer.limit_valid_batches=3",
    "optimizer=sgd",
    "scheduler.warmup_steps=200",  # small steps, so that rounding does not grow
    "trainer.precision=fp32",
)
TERM = "app.losses.weighted_sum.Term"
FOCAL, DICE = "app.losses.focal.FocalLoss", "app.losses.dice.DiceLoss"
GROUPS = [  # of two optimizers
    "model=mlp",
    "model.hidden=[16,16]",
    "optimizer=muon",
    "+optimizer.groups.first={parameters: layers.1, lr_scale: 0.5}",
    "optimizer.layer_decay=0.8",
    "optimizer.decay_norm_and_bias=false",
    "trainer.gradient_clip_agc=0.01",
]
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


class ResultRecorder(Callback):
    """Records the results of all stages."""

    def __init__(self) -> None:
        self.results: list[StageResult] = []

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        self.results.append(result)


@dataclass(frozen=True)
class Fit:
    """Result of a training on rank 0."""

    weights: dict[str, Tensor]
    steps: list[pd.DataFrame]
    rows: list[dict[str, Any]]
    used_ddp: bool


def fit(*overrides: str) -> Fit:
    torch.set_num_threads(1)
    job, folder = job_for(*overrides), Path(tempfile.mkdtemp())
    instantiate, recorder = Instantiator(job.trusted), ResultRecorder()
    components = make_components(job.config, instantiate, CPU)
    callback = recorder if rank() == 0 else Callback()
    trainer = run.make_trainer(job, instantiate, components, callback, folder)
    trainer.fit(components.loaders["train"], components.loaders.get("valid"))
    weights = gather_to_cpu(trainer.task.model.state_dict())
    return Fit(
        {name: tensor.clone() for name, tensor in weights.items()},
        [result.steps for result in recorder.results],
        [result.row for result in recorder.results],
        getattr(trainer.steps.strategy, "ddp", None) is not None,
    )


def assert_same(one: Fit, several: Fit, **tolerance: float) -> None:
    assert len(one.steps) == len(several.steps)
    for one_steps, several_steps in zip(one.steps, several.steps, strict=True):
        assert list(one_steps["num_samples"]) == list(several_steps["num_samples"])
        for column in set(one_steps) - {"stage", "iter_time", "data_time"}:
            actual = torch.tensor(several_steps[column].to_numpy(dtype=float))
            expected = torch.tensor(one_steps[column].to_numpy(dtype=float))
            torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance)
    for one_row, several_row in zip(one.rows, several.rows, strict=True):
        for name in ("accuracy", "total_correct", "total_samples"):
            assert one_row.get(name) == several_row.get(name)
    for name, tensor in one.weights.items():
        torch.testing.assert_close(several.weights[name], tensor, **tolerance)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=mlp"],
        [
            *("model=mlp", "optimizer=adamw", "optimizer.lr=0.001", "average=ema"),
            "trainer.valid_every_n_steps=3",
        ],
        [
            "model=mlp",
            "trainer.accumulate_grad_batches=3",
            "trainer.gradient_clip_norm=0.5",
            "trainer.gradient_norm=true",
        ],
        [
            "model=mlp",
            "data.batch_size=7",
            "data.split.valid=101",
            "trainer.limit_valid_batches=null",
        ],
        [
            "model=mlp",
            "data.batch_size=7",
            "trainer.accumulate_grad_batches=3",
            "loss.cross_entropy.function.weight=[0.1,1,2,1,5,1,1,3,1,9]",
        ],
        GROUPS,
        ["model=lenet", "+freeze.first={parameters: features, until_epoch: 2}"],
        ["model=lenet", "+freeze.first={parameters: features, from_epoch: 2}"],
    ],
    ids=[
        "plain",
        "adamw-ema",
        "accumulate-clip",
        "uneven",
        "class-weights",
        "groups",
        "unfreeze",
        "freeze",
    ],
)
def test_fit_ddp_matches_one_rank(overrides: list[str]) -> None:
    """Three ranks have unequal parts of each batch; two ranks divide it evenly."""
    one = fit(*SHORT, *overrides)
    for size in (2, 3) if overrides == ["model=mlp"] else (3,):
        several = run_on_ranks(size, fit, *SHORT, *overrides)[0]
        assert several.used_ddp
        assert_same(one, several, **ROUNDING)


def test_fit_last_batch_smaller_than_number_of_ranks_matches_one_rank() -> None:
    overrides = [*SHORT, "model=mlp", "trainer.limit_train_batches=null", "data.split.valid=59979"]
    one = fit(*overrides, "data.batch_size=10")  # 21 samples: batches of 10, 10 and 1
    assert list(one.steps[0]["num_samples"]) == [10, 10, 1]
    assert_same(one, run_on_ranks(3, fit, *overrides, "data.batch_size=10")[0], **ROUNDING)


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss=dice", "loss.dice.function.per_sample=false"],
        ["loss=cross_entropy", "data.ignore_index=0"],
        ["loss=dice_ce", "data.ignore_index=0"],
        [
            *("loss=cross_entropy", "loss.cross_entropy.function.weight=[0.1,1,9]"),
            f"+loss.focal={{_target_: {TERM}, function: {{_target_: {FOCAL}, ignore_index: 0}}}}",
            f"+loss.area={{_target_: {TERM}, function: {{_target_: {DICE}, per_sample: false}}}}",
        ],
    ],
    ids=["dice-of-the-batch", "ignored-pixels", "ignored-pixels-of-two-parts", "several-terms"],
)
def test_fit_segmentation_matches_one_rank(overrides: list[str]) -> None:
    """The loss divides by sums over the batch, of which each rank has an unequal part or none.

    Two accumulated batches of half the size train as one.
    """
    overrides = [
        *SHORT[:-1],
        "experiment=shapes_unet",
        "~model",
        "+model={_target_: torch.nn.Conv2d, in_channels: 1, out_channels: 3, kernel_size: 5,"
        " padding: 2}",
        "data.image_size=16",
        "data.batch_size=4",
        "data.split.valid=795",  # 5 training samples: in the second batch two ranks have none
        "data.eval_batch_size=100",
        *overrides,
    ]
    one = fit(*overrides)
    assert_same(one, run_on_ranks(3, fit, *overrides)[0], **ROUNDING)
    halves = ["data.batch_size=2", "trainer.accumulate_grad_batches=2"]
    accumulated = run_on_ranks(3, fit, *overrides, *halves)[0]
    for name, tensor in one.weights.items():
        torch.testing.assert_close(accumulated.weights[name], tensor, **ROUNDING)


def test_fit_accumulated_dice_with_batchnorm_matches_one_rank() -> None:
    """Sums over accumulated batches are those of training: padding is not part of their norms."""
    overrides = [
        *SHORT[:-1],
        "experiment=shapes_unet",
        *("model.depth=1", "model.width=4", "data.image_size=16"),
        *("loss=dice", "loss.dice.function.per_sample=false"),
        *("data.batch_size=2", "trainer.accumulate_grad_batches=3"),
        "data.split.valid=795",  # 5 training samples: batches of 2, 2 and 1
        "data.eval_batch_size=100",
    ]
    one, several = fit(*overrides), run_on_ranks(3, fit, *overrides)[0]
    assert_same(one, several, rtol=0, atol=1e-4)


def test_fit_fsdp_matches_one_rank() -> None:
    overrides = [
        *SHORT,
        "model=mlp",
        "trainer.gradient_clip_norm=0.5",
        "trainer.gradient_norm=true",
    ]
    overrides += ["optimizer=adamw", "optimizer.lr=0.001", "average=ema"]
    overrides += ["loss.cross_entropy.function.weight=[0.1,1,2,1,5,1,1,3,1,9]"]
    several = run_on_ranks(3, fit, *overrides, "trainer.strategy=fsdp")[0]
    assert_same(fit(*overrides), several, **ROUNDING)


def test_fit_fsdp_with_groups_of_two_optimizers_matches_one_rank() -> None:
    one = fit(*SHORT, *GROUPS)
    for size in (2, 3):
        several = run_on_ranks(size, fit, *SHORT, *GROUPS, "trainer.strategy=fsdp")[0]
        assert_same(one, several, **ROUNDING)


def test_fit_distilled_matches_one_rank(tmp_path: Path) -> None:
    """Three ranks have unequal parts of two batches, and two of them nothing of the last one."""
    teacher = [*SHORT, "trainer.max_epochs=1", "trainer.limit_train_batches=2", "callbacks=none"]
    execute(job_for(*teacher, "model=mlp", "trainer.limit_test_batches=1"), tmp_path)
    overrides = [*SHORT, "model=mlp", "task=distill", f"teacher={tmp_path}"]
    overrides += ["trainer.limit_train_batches=null", "data.split.valid=59979"]
    overrides += ["data.batch_size=10", "trainer.accumulate_grad_batches=2"]
    one = fit(*overrides)
    for strategy in ("ddp", "fsdp"):
        several = run_on_ranks(3, fit, *overrides, f"trainer.strategy={strategy}")[0]
        assert_same(one, several, **ROUNDING)


def fit_error(*overrides: str) -> str:
    try:
        fit(*overrides)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=mnist_dcgan", "trainer.strategy=fsdp"], "needs a single optimizer"),
        (["+loss.cross_entropy.function.reduction=sum"], "CrossEntropyLoss with reduction='sum'"),
    ],
)
def test_fit_unsupported_on_several_ranks_is_refused(overrides: list[str], message: str) -> None:
    errors = run_on_ranks(2, fit_error, "trainer.limit_train_batches=2", *overrides)
    assert all(message in error for error in errors), errors


@pytest.mark.long
def test_fit_compiled_ddp_matches_one_rank() -> None:
    overrides = [*SHORT, "model=mlp", "trainer.compile=true"]
    assert_same(fit(*overrides), run_on_ranks(2, fit, *overrides)[0], **ROUNDING)


def test_fit_mixed_precision_ddp_is_close_to_one_rank() -> None:
    for precision in ("bf16", "fp16"):
        overrides = [*SHORT, "model=mlp", f"trainer.precision={precision}"]
        one, two = fit(*overrides), run_on_ranks(2, fit, *overrides)[0]
        for one_steps, two_steps in zip(one.steps, two.steps, strict=True):
            assert list(two_steps["loss"]) == pytest.approx(list(one_steps["loss"]), abs=1e-2)


def test_fit_fsdp_of_nested_convolutional_model_is_close_to_ddp() -> None:
    overrides = [
        *SHORT,
        "model=resnet18",
        "model.width=8",
        "data.batch_size=6",
        "optimizer.lr=0.001",
    ]
    overrides += ["trainer.limit_train_batches=2", "trainer.limit_valid_batches=1"]
    ddp, fsdp = (
        run_on_ranks(2, fit, *overrides, f"trainer.strategy={strategy}")[0]
        for strategy in ("ddp", "fsdp")
    )
    for ddp_steps, fsdp_steps in zip(ddp.steps, fsdp.steps, strict=True):
        assert list(fsdp_steps["loss"]) == pytest.approx(list(ddp_steps["loss"]), abs=1e-3)


def test_fit_sync_batchnorm_matches_one_rank() -> None:
    overrides = [*SHORT, "experiment=mnist_multitask", "optimizer=sgd", "optimizer.lr=0.01"]
    one, two, three = (run_on_ranks(size, fit, *overrides)[0] for size in (1, 2, 3))
    assert_same(two, three, **ROUNDING)
    # On one rank, torch's CPU kernel is used, whose rounding differs by about 1e-5
    assert_same(one, two, rtol=0, atol=1e-4)


def test_fit_without_sync_batchnorm_differs_from_one_rank() -> None:
    overrides = [*SHORT, "experiment=mnist_multitask", "optimizer=sgd", "optimizer.lr=0.01"]
    one, two = (run_on_ranks(n, fit, *overrides, "trainer.sync_batchnorm=false")[0] for n in (1, 2))
    with pytest.raises(AssertionError):
        assert_same(one, two, rtol=0, atol=1e-4)


def sync_batchnorm_results(padding_rank: int | None) -> list[Tensor]:
    """Return gradient, running mean and variance for 7 samples, split over the ranks.

    With a padding rank, every rank has all samples, and those of the padding rank do not count.
    """
    torch.manual_seed(0)
    norm = convert_sync_batchnorm(nn.BatchNorm2d(3), CPU).double()
    images = (torch.randn(7, 3, 4, 4) * 3 + 2).double().requires_grad_()
    weights = torch.linspace(0, 1, 7 * 48).view(7, 3, 4, 4).double()
    part = slice(0, 7) if padding_rank is not None else local_slice(7)
    norm.is_active = rank() != padding_rank  # type: ignore[assignment]
    (norm(images[part]) * weights[part]).square().sum().mul(float(norm.is_active)).backward()
    gradient = images.grad
    assert gradient is not None
    assert isinstance(norm.running_mean, Tensor)
    assert isinstance(norm.running_var, Tensor)
    return [gradient, norm.running_mean, norm.running_var]


def test_sync_batchnorm_matches_torch_batchnorm() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3).double()
    images = (torch.randn(7, 3, 4, 4) * 3 + 2).double().requires_grad_()
    weights = torch.linspace(0, 1, 7 * 48).view(7, 3, 4, 4).double()
    (norm(images) * weights).square().sum().backward()
    expected = [images.grad, norm.running_mean, norm.running_var]
    split = run_on_ranks(3, sync_batchnorm_results, None)
    gradient = sum(results[0] for results in split)
    torch.testing.assert_close(gradient, expected[0], rtol=1e-5, atol=1e-5)
    padded = run_on_ranks(2, sync_batchnorm_results, 1)[0]
    for results in (split[0], padded):
        torch.testing.assert_close(results[1:], expected[1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded[0], expected[0], rtol=1e-5, atol=1e-5)


# Custom tasks


class TwoPartModel(nn.Module):
    """Two layers that are called separately, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = (nn.Linear(4, 4) for _ in range(3))


class AlternatingTask(Task):
    """Trains two layers with an optimizer each, without calling the model as a whole."""

    def train_step(self, batch: Nested) -> StepOutput:
        assert self.optimizers is not None
        (inputs,) = batch
        hidden = self.model.first(inputs)  # type: ignore[operator]
        loss = self.model.second(hidden.detach()).square().mean()  # type: ignore[operator]
        self.optimizers["second"].step(loss, len(inputs))
        other = self.model.second(hidden).sub(1).square().mean()  # type: ignore[operator]
        self.optimizers["first"].step(other, len(inputs))
        return self.step_output("train", inputs, None, loss)


def train(
    task: Task, strategy: SingleDevice, loader: BatchLoader, epochs: int = 2
) -> dict[str, Tensor]:
    limits = TrainingLimits(epochs, sanity_valid_batches=0)
    trainer = Trainer(task, limits, Path(tempfile.mkdtemp()), strategy=strategy)
    trainer.fit(loader)
    return {name: tensor.detach().clone() for name, tensor in task.model.state_dict().items()}


def toy_loader(count: int = 23, batch_size: int = 5) -> BatchLoader:
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(3))
    return make_loader(TensorDataset(inputs), batch_size, shuffle=True)


def step_with_infinite_loss_on_one_rank() -> tuple[int, float]:
    """Return the number of steps and the weight; the gradients are finite on both ranks."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    strategy = DDPStrategy(model, CPU, True, False)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.5), strategy=strategy)
    OptimWrapperDict(wrapper, "skip")
    infinity = float("inf") if rank() == 1 else 0.0
    wrapper.step(strategy(torch.ones(1, 1)).sum() + infinity, 1)
    return wrapper.steps, model.weight.item()


def test_infinite_loss_on_one_rank_is_refused_by_all() -> None:
    assert run_on_ranks(2, step_with_infinite_loss_on_one_rank) == [(0, 1.0), (0, 1.0)]


def train_alternating() -> dict[str, Tensor]:
    torch.manual_seed(1)
    task = AlternatingTask(TwoPartModel())
    strategy = (
        DDPStrategy(task.model, CPU, False, False) if world_size() > 1 else SingleDevice(task.model)
    )
    task.prepare_training(
        OptimWrapperDict(
            {
                name: OptimWrapper(
                    torch.optim.AdamW(task.model.get_submodule(name).parameters(), 0.01),
                    batch_size=5,
                    owns_all_parameters=False,
                    strategy=strategy,
                )
                for name in ("first", "second")
            }
        )
    )
    return train(task, strategy, toy_loader())


def test_ddp_without_calling_whole_model_matches_one_rank() -> None:
    one = train_alternating()
    for size in (2, 3):
        for weights in run_on_ranks(size, train_alternating):
            for name, tensor in one.items():
                torch.testing.assert_close(weights[name], tensor, **ROUNDING)


class SometimesUsedLayer(nn.Module):
    """Has a second layer that is used in every n-th call only, or never (0).

    With a negative number, the calls that use it differ between ranks.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self.layer, self.other, self.every, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), every, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += self.training
        hidden: Tensor = self.layer(inputs)
        call = self.calls + rank() if self.every < 0 else self.calls
        is_used = self.every and call % abs(self.every) == 1
        return self.other(hidden) if is_used else hidden  # type: ignore[no-any-return]


def train_sometimes_used(every: int, find_unused: bool) -> dict[str, Tensor] | str:
    torch.manual_seed(1)
    task = SupervisedTask(SometimesUsedLayer(every), F.mse_loss, targets=0)
    strategy = SingleDevice(task.model)
    if world_size() > 1:
        strategy = DDPStrategy(task.model, CPU, True, find_unused)
    optimizer = torch.optim.AdamW(task.model.parameters(), 0.01, weight_decay=0.1)
    wrapper = OptimWrapper(optimizer, batch_size=5, strategy=strategy)
    task.prepare_training(OptimWrapperDict(wrapper), strategy)
    try:
        return train(task, strategy, toy_loader())
    except (UserError, RuntimeError) as error:  # RuntimeError: the other rank has exited
        return str(error)


@pytest.mark.parametrize(("every", "find_unused"), [(0, False), (2, True)])
def test_ddp_unused_parameters_match_one_rank(every: int, find_unused: bool) -> None:
    one, several = (
        train_sometimes_used(every, find_unused),
        run_on_ranks(2, train_sometimes_used, every, find_unused),
    )
    assert isinstance(one, dict)
    for name, tensor in one.items():
        torch.testing.assert_close(several[0][name], tensor, **ROUNDING)
        torch.testing.assert_close(several[1][name], tensor, **ROUNDING)


@pytest.mark.parametrize("every", [2, -2])  # in the same steps on all ranks, or in different ones
def test_ddp_sometimes_unused_parameters_error_names_option(every: int) -> None:
    errors = run_on_ranks(2, train_sometimes_used, every, False)
    assert any("trainer.find_unused_parameters=False" in error for error in errors)


# Data


class IndexedDataset(Dataset[tuple[Tensor, str]]):
    """Samples that contain their index, a random number and a name."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        if index >= self.count:
            raise IndexError(index)
        return torch.tensor([float(index), torch.rand(()).item()]), f"name {index}"


class ShuffledStream(IterableDataset[Tensor]):
    """Sample indices in random order."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(self.count).tolist()
        return (torch.tensor([float(index), 0.0]) for index in order)


def make_counting_loader(kind: str, count: int, batch_size: int) -> BatchLoader:
    sampler, preparer = EpochSampler(count, count, 5), BatchPreparer(CPU)
    if kind == "tensors":
        tensors = TensorDataset(torch.stack([torch.arange(float(count)), torch.zeros(count)], 1))
        return TensorLoader(tensors, sampler, batch_size, preparer, on_device=True)
    if kind == "stream":
        return make_loader(ShuffledStream(count), batch_size)
    options = DataLoaderOptions(num_workers=2 if kind == "workers" else 0)
    samples = transform_samples(IndexedDataset(count), [add_noise], 0)
    return SampleLoader(samples, sampler, batch_size, preparer, 7, options)


def add_noise(x: Tensor) -> Tensor:
    """Transform a sample at random."""
    return x + torch.rand(())


def local_batches(kind: str, count: int, batch_size: int) -> list[list[list[float]]]:
    """Return this rank's samples of each batch of two epochs."""
    loader = make_counting_loader(kind, count, batch_size)
    torch.manual_seed(rank())  # as the trainer does
    batches = itertools.chain(loader.epoch(1), loader.epoch(2))
    shares = [[] if batch is None else batch for batch in batches]
    return [_inputs_as_list(share) for share in shares]


def _inputs_as_list(batch: Any) -> list[list[float]]:
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    return batch.tolist() if isinstance(batch, Tensor) else []


@pytest.mark.parametrize(
    ("kind", "count", "batch_size"),
    [
        *itertools.product(["tensors", "samples", "stream"], [23, 2], [6]),
        ("samples", 9, 4),
        ("workers", 9, 6),
    ],
)
def test_loader_ranks_split_each_batch(kind: str, count: int, batch_size: int) -> None:
    one = local_batches(kind, count, batch_size)
    shares = run_on_ranks(2 if kind == "workers" else 3, local_batches, kind, count, batch_size)
    merged = [[*itertools.chain(*parts)] for parts in zip(*shares, strict=True)]
    if kind == "stream":  # in another random order, but with each sample once per epoch
        merged, one = ([sorted(itertools.chain(*e)) for e in halves(b)] for b in (merged, one))
    assert merged == one
    sizes = [[len(part) for part in parts] for parts in zip(*shares, strict=True)]
    assert all(max(lengths) - min(lengths) <= 1 for lengths in sizes)


def halves(batches: list[Any]) -> list[list[Any]]:
    middle = len(batches) // 2
    return [batches[:middle], batches[middle:]]


# Evaluation


class LabelRecorder(ResultRecorder):
    """Records the labels of all ranks in each test step."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[int] = []

    def needs_all_ranks(self, start: StageStart) -> bool:
        return start.stage == "test"

    def on_step_end(self, step: StepEnd) -> None:
        self.labels += step.batch[1].tolist()
        assert len(step.outputs) == len(step.batch[1])


def evaluate(count: int, batch_size: int) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(count)
    logits = torch.randn(count, 4, generator=generator)
    labels = torch.arange(count) % 4
    metrics = StageMetrics(
        {
            "accuracy": c.MulticlassAccuracy(4, average="micro", validate_args=False),
            "f1": c.MulticlassF1Score(4, validate_args=False),
            "matrix": c.MulticlassConfusionMatrix(4, validate_args=False),
            "curve": c.MulticlassPrecisionRecallCurve(4, thresholds=50, validate_args=False),
            "auroc": c.MulticlassAUROC(4, validate_args=False),
            "wrapped": LambdaInputTransformer(
                c.MulticlassAccuracy(4, validate_args=False), lambda outputs: outputs * 2
            ),
        },
        "test",
    )
    task = SupervisedTask(nn.Identity(), F.cross_entropy, {"test": metrics})
    callback = LabelRecorder() if rank() == 0 else Callback()
    trainer = Trainer(task, TrainingLimits(1), Path(tempfile.mkdtemp()), callbacks=callback)
    trainer.run_stage("test", 1, make_loader(TensorDataset(logits, labels), batch_size))
    row = {
        k: v for k, v in trainer.state.history[0].items() if k not in ("epoch_time", "samples/s")
    }
    if not isinstance(callback, LabelRecorder):
        return row, {}, []
    return row, callback.results[0].arrays, callback.labels


@pytest.mark.parametrize(("count", "batch_size"), [(101, 8), (40, 10), (2, 8), (1, 1)])
def test_evaluation_on_several_ranks_matches_one_rank(count: int, batch_size: int) -> None:
    row, arrays, labels = evaluate(count, batch_size)
    assert labels == [index % 4 for index in range(count)]
    for size in (2, 3):
        results = run_on_ranks(size, evaluate, count, batch_size)
        rank_row, rank_arrays, rank_labels = results[0]
        assert all(
            other_row == rank_row for other_row, *_ in results
        )  # same decisions on all ranks
        for name, value in row.items():
            is_exact = isinstance(value, (int, str)) or name == "accuracy"
            expected = value if is_exact else pytest.approx(value, abs=1e-6, nan_ok=True)
            assert rank_row[name] == expected, name
        assert rank_arrays.keys() == arrays.keys()
        for name, array in arrays.items():
            torch.testing.assert_close(
                torch.as_tensor(rank_arrays[name]),
                torch.as_tensor(array),
                equal_nan=True,
                **ROUNDING,
            )
        assert rank_labels == labels


# Collectives


def test_lazy_all_reduce_max_returns_value_at_same_step_on_all_ranks() -> None:
    results = run_on_ranks(3, first_nonzero_maximum, 1, 40)
    assert len({*results}) == 1
    step, maximum = results[0]
    assert maximum == 2
    assert step >= 40
    assert first_nonzero_maximum(0, 3) == (3, 2)  # without delay in a single process


def first_nonzero_maximum(sender: int, first_step: int) -> tuple[int, int]:
    """Send 2 from one rank from a step on; return when a maximum arrives, and the maximum."""
    lazy_max = LazyAllReduceMax()
    for step in itertools.count():
        maximum = lazy_max(2 if rank() == sender and step >= first_step else 0)
        if maximum:
            lazy_max.wait(0)
            return step, maximum
        time.sleep(0.001 * (rank() + 1))
    raise AssertionError


def test_lazy_all_reduce_max_wait_includes_last_value() -> None:
    assert run_on_ranks(2, maximum_after_wait, 1) == [3, 3]
    assert maximum_after_wait(0) == 3


def maximum_after_wait(sender: int) -> int:
    lazy_max = LazyAllReduceMax()
    for _ in range(3):
        lazy_max(0)
    return lazy_max.wait(3 if rank() == sender else 0)
