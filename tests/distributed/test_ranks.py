"""Several ranks learn and measure as one: real processes over gloo, against a single one.

Sums of float32 are taken in another order, so losses and weights agree to 1e-6, and to 1e-5 of
their size; what is counted agrees to the last digit.
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
from app.data.loaders import DataLoaderOptions, SampleLoader, TensorLoader, load
from app.data.sampling import EpochSampler
from app.distributed.collectives import LazyAllReduceMax, local_slice, rank, world_size
from app.distributed.strategies import DDPStrategy, SingleDevice
from app.distributed.sync_batchnorm import convert_sync_batchnorm
from app.experiment import run
from app.experiment.factory import make_components
from app.metrics.stage_metrics import as_metrics
from app.runtime.errors import UserError
from app.runtime.nested import Nested, slice_batch
from app.training.accumulator import StageResult
from app.training.checkpoint.train_state import gather_to_cpu
from app.training.events import Callback, StageStart, StepEnd
from app.training.history import History
from app.training.optim.optim_wrapper import OptimWrapper, OptimWrapperDict
from app.training.plan import TrainingLimits
from app.training.supervised import SupervisedTask
from app.training.task import StepOutput, Task
from app.training.trainer import Trainer
from tests.support.rank_functions import in_ranks
from tests.support.runs import job_for

CPU = torch.device("cpu")
SHORT = (
    "trainer.max_epochs=2",
    "data.batch_size=50",
    "trainer.limit_train_batches=8",
    "trainer.limit_valid_batches=3",
    "optimizer=sgd",
    "trainer.precision=fp32",
)
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


class Listener(Callback):
    """Remembers the stages."""

    def __init__(self) -> None:
        self.results: list[StageResult] = []

    def on_stage_end(self, result: StageResult, history: History) -> None:  # noqa: ARG002
        self.results.append(result)


@dataclass(frozen=True)
class Fit:
    """What a training came to, in rank 0."""

    weights: dict[str, Tensor]
    steps: list[pd.DataFrame]
    rows: list[dict[str, Any]]
    by_ddp: bool


def fit(*words: str) -> Fit:
    torch.set_num_threads(1)
    job, folder = job_for(*words), Path(tempfile.mkdtemp())
    build, listener = Instantiator(job.trusted), Listener()
    parts = make_components(job.config, build, CPU)
    watching = listener if rank() == 0 else Callback()
    trainer = run.make_trainer(job, build, parts, watching, folder)
    trainer.fit(parts.loaders["train"], parts.loaders.get("valid"))
    weights = gather_to_cpu(trainer.task.model.state_dict())
    return Fit(
        {name: tensor.clone() for name, tensor in weights.items()},
        [result.steps for result in listener.results],
        [result.row for result in listener.results],
        getattr(trainer.strategy, "ddp", None) is not None,
    )


def assert_same(one: Fit, several: Fit, **tolerance: float) -> None:
    assert len(one.steps) == len(several.steps)
    for mine, theirs in zip(one.steps, several.steps, strict=True):
        assert list(mine["num_samples"]) == list(theirs["num_samples"])
        for column in set(mine) - {"stage", "iter_time"}:
            found = torch.tensor(theirs[column].to_numpy(dtype=float))
            wanted = torch.tensor(mine[column].to_numpy(dtype=float))
            torch.testing.assert_close(found, wanted, equal_nan=True, **tolerance)
    for mine_row, theirs_row in zip(one.rows, several.rows, strict=True):
        for name in ("accuracy", "total_correct", "total_samples"):
            assert mine_row.get(name) == theirs_row.get(name)
    for name, tensor in one.weights.items():
        torch.testing.assert_close(several.weights[name], tensor, **tolerance)


@pytest.mark.parametrize(
    "words",
    [
        ["model=mlp"],
        ["model=mlp", "optimizer=adamw", "optimizer.lr=0.001", "average=ema"],
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
        ["model=lenet", "+freeze.first={parameters: features, until_epoch: 2}"],
        ["model=lenet", "+freeze.first={parameters: features, from_epoch: 2}"],
    ],
    ids=["plain", "adamw-ema", "accumulate-clip", "uneven", "thawed", "frozen"],
)
def test_any_number_of_ranks_learns_the_same(words: list[str]) -> None:
    one = fit(*SHORT, *words)
    for size in (2, 3):
        several = in_ranks(size, fit, *SHORT, *words)[0]
        assert several.by_ddp
        assert_same(one, several, **ROUNDING)


def test_the_last_batch_may_be_smaller_than_the_ranks_are_many() -> None:
    words = [*SHORT, "model=mlp", "trainer.limit_train_batches=null", "data.split.valid=59979"]
    one = fit(*words, "data.batch_size=10")  # 21 samples: batches of 10, 10 and 1
    assert list(one.steps[0]["num_samples"]) == [10, 10, 1]
    assert_same(one, in_ranks(3, fit, *words, "data.batch_size=10")[0], **ROUNDING)


def test_sharded_weights_learn_the_same() -> None:
    words = [*SHORT, "model=mlp", "trainer.gradient_clip_norm=0.5", "trainer.gradient_norm=true"]
    words += ["optimizer=adamw", "optimizer.lr=0.001", "average=ema"]
    one = fit(*words)
    for size in (2, 3):
        assert_same(one, in_ranks(size, fit, *words, "trainer.strategy=fsdp")[0], **ROUNDING)


def refused(*words: str) -> str:
    try:
        fit(*words)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["experiment=mnist_dcgan", "trainer.strategy=fsdp"], "needs a task that calls the model"),
        (["+loss.cross_entropy.function.reduction=sum"], "CrossEntropyLoss with reduction='sum'"),
    ],
)
def test_what_several_ranks_cannot_do_is_refused(words: list[str], told: str) -> None:
    found = in_ranks(2, refused, "trainer.limit_train_batches=2", *words)
    assert all(told in text for text in found), found


@pytest.mark.long
def test_compiled_ranks_learn_the_same() -> None:
    words = [*SHORT, "model=mlp", "trainer.compile=true"]
    assert_same(fit(*words), in_ranks(2, fit, *words)[0], **ROUNDING)


def test_narrow_types_learn_nearly_the_same() -> None:
    for precision in ("bf16", "fp16"):
        words = [*SHORT, "model=mlp", f"trainer.precision={precision}"]
        one, two = fit(*words), in_ranks(2, fit, *words)[0]
        for mine, theirs in zip(one.steps, two.steps, strict=True):
            assert list(theirs["loss"]) == pytest.approx(list(mine["loss"]), abs=1e-2)


def test_models_of_nested_parts_and_convolutions_are_sharded() -> None:
    words = [*SHORT, "model=resnet18", "model.width=8", "data.batch_size=6", "optimizer.lr=0.001"]
    words += ["trainer.limit_train_batches=2", "trainer.limit_valid_batches=1"]
    two, sharded = (
        in_ranks(2, fit, *words, f"trainer.strategy={strategy}")[0] for strategy in ("ddp", "fsdp")
    )
    for mine, theirs in zip(two.steps, sharded.steps, strict=True):
        assert list(theirs["loss"]) == pytest.approx(list(mine["loss"]), abs=1e-3)


def test_batch_normalisation_is_over_all_ranks() -> None:
    words = [*SHORT, "experiment=mnist_multitask", "optimizer=sgd", "optimizer.lr=0.01"]
    one, two, three = (in_ranks(size, fit, *words)[0] for size in (1, 2, 3))
    assert_same(two, three, **ROUNDING)
    # torch's own kernel for the CPU rounds otherwise: it is off by 1e-5, and so are we from it
    assert_same(one, two, rtol=0, atol=1e-4)


def test_without_synchronised_norms_ranks_use_their_own_statistics() -> None:
    words = [*SHORT, "experiment=mnist_multitask", "optimizer=sgd", "optimizer.lr=0.01"]
    one, two = (in_ranks(n, fit, *words, "trainer.sync_batchnorm=false")[0] for n in (1, 2))
    with pytest.raises(AssertionError):
        assert_same(one, two, rtol=0, atol=1e-4)


def normalised(lent: int | None) -> list[Tensor]:
    """Of 7 samples, which the rank `lent` is only lent."""
    torch.manual_seed(0)
    norm = convert_sync_batchnorm(nn.BatchNorm2d(3), CPU).double()
    images = (torch.randn(7, 3, 4, 4) * 3 + 2).double().requires_grad_()
    weights = torch.linspace(0, 1, 7 * 48).view(7, 3, 4, 4).double()
    mine = slice(0, 7) if lent is not None else local_slice(7)
    norm.is_active = rank() != lent  # type: ignore[assignment]
    (norm(images[mine]) * weights[mine]).square().sum().mul(float(norm.is_active)).backward()
    gradient = images.grad
    assert gradient is not None
    assert isinstance(norm.running_mean, Tensor)
    assert isinstance(norm.running_var, Tensor)
    return [gradient, norm.running_mean, norm.running_var]


def test_synchronised_norm_has_the_gradients_of_torchs() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3).double()
    images = (torch.randn(7, 3, 4, 4) * 3 + 2).double().requires_grad_()
    weights = torch.linspace(0, 1, 7 * 48).view(7, 3, 4, 4).double()
    (norm(images) * weights).square().sum().backward()
    wanted = [images.grad, norm.running_mean, norm.running_var]
    several = in_ranks(3, normalised, None)
    torch.testing.assert_close(sum(found[0] for found in several), wanted[0], rtol=1e-5, atol=1e-5)
    lent = in_ranks(2, normalised, 1)[0]
    for found in (several[0], lent):
        torch.testing.assert_close(found[1:], wanted[1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lent[0], wanted[0], rtol=1e-5, atol=1e-5)


# Tasks of one's own


class Parts(nn.Module):
    """Two parts that are called by themselves, and one that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.idle = (nn.Linear(4, 4) for _ in range(3))


class InTurns(Task):
    """Two optimizers, each of a part, neither through the model as a whole."""

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
    task: Task, parallel: SingleDevice, data: BatchLoader, epochs: int = 2
) -> dict[str, Tensor]:
    plan = TrainingLimits(epochs, sanity_valid_batches=0)
    trainer = Trainer(task, plan, Path(tempfile.mkdtemp()), strategy=parallel)
    trainer.fit(data)
    return {name: tensor.detach().clone() for name, tensor in task.model.state_dict().items()}


def points(count: int = 23, batch_size: int = 5) -> BatchLoader:
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(3))
    return load(TensorDataset(inputs), batch_size, shuffle=True)


def in_turns() -> dict[str, Tensor]:
    torch.manual_seed(1)
    task = InTurns(Parts())
    several = world_size() > 1
    parallel = DDPStrategy(task.model, CPU, False, False) if several else SingleDevice(task.model)
    task.optimizers = OptimWrapperDict(
        {
            name: OptimWrapper(
                torch.optim.AdamW(task.model.get_submodule(name).parameters(), 0.01),
                batch_size=5,
                owns_all_parameters=False,
                strategy=parallel,
            )
            for name in ("first", "second")
        }
    )
    return train(task, parallel, points())


def test_steps_that_go_round_the_model_are_summed_all_the_same() -> None:
    one = in_turns()
    for size in (2, 3):
        for found in in_ranks(size, in_turns):
            for name, tensor in one.items():
                torch.testing.assert_close(found[name], tensor, **ROUNDING)


class SometimesUsed(nn.Module):
    """A second layer that takes part in each second call only, or never."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.layer, self.other, self.every, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), every, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += self.training
        hidden: Tensor = self.layer(inputs)
        mine = self.calls + rank() if self.every < 0 else self.calls
        uses = self.every and mine % abs(self.every) == 1
        return self.other(hidden) if uses else hidden  # type: ignore[no-any-return]


def sometimes(every: int, find_unused: bool) -> dict[str, Tensor] | str:
    torch.manual_seed(1)
    task = SupervisedTask(SometimesUsed(every), F.mse_loss, targets=0)
    parallel = SingleDevice(task.model)
    if world_size() > 1:
        parallel = DDPStrategy(task.model, CPU, True, find_unused)
        task.forward_model = parallel
    optimizer = torch.optim.AdamW(task.model.parameters(), 0.01, weight_decay=0.1)
    task.optimizers = OptimWrapperDict(OptimWrapper(optimizer, batch_size=5, strategy=parallel))
    try:
        return train(task, parallel, points())
    except (UserError, RuntimeError) as error:  # the other rank is gone then
        return str(error)


@pytest.mark.parametrize(("every", "find_unused"), [(0, False), (2, True)])
def test_parameters_without_use_stay_as_they_are(every: int, find_unused: bool) -> None:
    one, several = sometimes(every, find_unused), in_ranks(2, sometimes, every, find_unused)
    assert isinstance(one, dict)
    for name, tensor in one.items():
        torch.testing.assert_close(several[0][name], tensor, **ROUNDING)
        torch.testing.assert_close(several[1][name], tensor, **ROUNDING)


@pytest.mark.parametrize("every", [2, -2])  # in the same steps, or not even that
def test_parameters_used_now_and_then_name_the_option(every: int) -> None:
    told = in_ranks(2, sometimes, every, False)
    assert any("trainer.find_unused_parameters=False" in text for text in told)


# Data


class Numbered(Dataset[tuple[Tensor, str]]):
    """Samples that say who they are."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        if index >= self.count:
            raise IndexError(index)
        return torch.tensor([float(index), torch.rand(()).item()]), f"name {index}"


class Stream(IterableDataset[Tensor]):
    """As many, in an order that is drawn."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(self.count).tolist()
        return (torch.tensor([float(index), 0.0]) for index in order)


def loader_of(kind: str, count: int, batch_size: int) -> BatchLoader:
    order, ready = EpochSampler(count, count, 5), BatchPreparer(CPU)
    if kind == "tensors":
        tensors = TensorDataset(torch.stack([torch.arange(float(count)), torch.zeros(count)], 1))
        return TensorLoader(tensors, order, batch_size, ready, on_device=True)
    if kind == "stream":
        return load(Stream(count), batch_size)
    workers = DataLoaderOptions(num_workers=2 if kind == "workers" else 0)
    return SampleLoader(Numbered(count), order, batch_size, ready, 7, workers)


def numbers_of(kind: str, count: int, batch_size: int) -> list[list[list[float]]]:
    """Of each batch of two epochs what this rank has."""
    loader = loader_of(kind, count, batch_size)
    torch.manual_seed(rank())  # as the loop does
    batches = itertools.chain(loader.epoch(1), loader.epoch(2))
    shares = [[] if batch is None else batch for batch in batches]
    return [s[0].tolist() if isinstance(s, (tuple, list)) and s else _list(s) for s in shares]


def _list(batch: Any) -> list[list[float]]:
    return batch.tolist() if isinstance(batch, Tensor) else []


@pytest.mark.parametrize(
    ("kind", "count", "batch_size"),
    [
        *itertools.product(["tensors", "samples", "stream"], [23, 2], [6]),
        ("samples", 9, 4),
        ("workers", 9, 6),
    ],
)
def test_ranks_share_out_each_batch(kind: str, count: int, batch_size: int) -> None:
    one = numbers_of(kind, count, batch_size)
    shares = in_ranks(2 if kind == "workers" else 3, numbers_of, kind, count, batch_size)
    found = [[*itertools.chain(*parts)] for parts in zip(*shares, strict=True)]
    if kind == "stream":  # the order is another draw, but each sample comes once in an epoch
        found, one = ([sorted(itertools.chain(*e)) for e in halves(b)] for b in (found, one))
    assert found == one
    sizes = [[len(part) for part in parts] for parts in zip(*shares, strict=True)]
    assert all(max(lengths) - min(lengths) <= 1 for lengths in sizes)


def halves(batches: list[Any]) -> list[list[Any]]:
    middle = len(batches) // 2
    return [batches[:middle], batches[middle:]]


def test_a_share_has_its_names_and_numbers() -> None:
    batch = {"x": torch.arange(4), "names": ["a", "b", "c", "d"], "scale": torch.tensor(2.0)}
    mine = slice_batch((batch, [torch.arange(8).view(4, 2)]), slice(1, 3), 4)
    assert mine[0]["names"] == ["b", "c"]
    assert mine[0]["x"].tolist() == [1, 2]
    assert mine[0]["scale"] == 2.0
    assert mine[1][0].tolist() == [[2, 3], [4, 5]]


# Evaluation


class Kept(Listener):
    """Watches the steps of all ranks."""

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
    metrics = as_metrics(
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
    watching = Kept() if rank() == 0 else Callback()
    trainer = Trainer(task, TrainingLimits(1), Path(tempfile.mkdtemp()), callbacks=watching)
    trainer.run_stage("test", 1, load(TensorDataset(logits, labels), batch_size))
    row = {
        k: v for k, v in trainer.state.history[0].items() if k not in ("epoch_time", "samples/s")
    }
    if not isinstance(watching, Kept):
        return row, {}, []
    return row, watching.results[0].arrays, watching.labels


@pytest.mark.parametrize(("count", "batch_size"), [(101, 8), (40, 10), (2, 8), (1, 1)])
def test_evaluation_on_any_number_of_ranks_is_the_same(count: int, batch_size: int) -> None:
    row, arrays, labels = evaluate(count, batch_size)
    assert labels == [index % 4 for index in range(count)]
    for size in (2, 3):
        told = in_ranks(size, evaluate, count, batch_size)
        assert all(other[0] == told[0][0] for other in told)  # all ranks steer by the same
        for name, value in row.items():
            exact = isinstance(value, (int, str)) or name == "accuracy"
            found = told[0][0][name]
            assert found == (value if exact else pytest.approx(value, abs=1e-6, nan_ok=True)), name
        assert told[0][1].keys() == arrays.keys()
        for name, wanted in arrays.items():
            torch.testing.assert_close(
                torch.as_tensor(told[0][1][name]),
                torch.as_tensor(wanted),
                equal_nan=True,
                **ROUNDING,
            )
        assert told[0][2] == labels


def last_word(voter: int) -> int:
    agreement = LazyAllReduceMax()
    for _ in range(3):
        agreement(0)
    return agreement.wait(3 if rank() == voter else 0)


def test_ranks_hear_of_a_vote_at_the_same_step() -> None:
    told = in_ranks(3, hears_lasting_vote, 1, 40)
    assert len({*told}) == 1
    number, heard = told[0]
    assert heard == 2
    assert number >= 40
    assert hears_lasting_vote(0, 3) == (3, 2)  # alone it is heard at once


def hears_lasting_vote(voter: int, step: int) -> tuple[int, int]:
    """A rank that wants to stop says so from that step on."""
    agreement = LazyAllReduceMax()
    for number in itertools.count():
        heard = agreement(2 if rank() == voter and number >= step else 0)
        if heard:
            agreement.wait(0)
            return number, heard
        time.sleep(0.001 * (rank() + 1))
    raise AssertionError


def test_the_last_word_is_heard() -> None:
    assert in_ranks(2, last_word, 1) == [3, 3]
    assert last_word(0) == 3
