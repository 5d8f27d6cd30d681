"""Train the same models with several libraries; `benchmarks/peers.py` compares them."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from torchvision import transforms

from app.data.mnist import mnist
from app.models.cnn import CNN
from app.models.mlp import MLP
from benchmarks.overhead import our_epoch

Batch = tuple[Tensor, Tensor]
MEAN, STD = 0.1307, 0.3081
BATCH_SIZE = 256
LR, WEIGHT_DECAY = 1e-3, 0.01
FOREVER = 10**9
BARE, OURS = "bare loop", "this program"
IN_MEMORY, TUTORIAL = "in memory", "as in tutorials"
STEPS = {  # by way and model
    IN_MEMORY: {"MLP": 200, "CNN": 20},
    TUTORIAL: {"MLP": 40, "CNN": 20},
}


@dataclass(frozen=True)
class Work:
    """What all sides do in an epoch.

    Attributes:
        model: `MLP` or `CNN`.
        way: `in memory` or `as in tutorials`.
        mnist: Folder with the files that torchvision reads.
        pace: To be called when an epoch begins; waits until it may.
        folder: What the side writes goes here.
    """

    model: str
    way: str
    mnist: Path
    pace: Callable[[], None]
    folder: Path

    @property
    def steps(self) -> int:
        return STEPS[self.way][self.model]

    @property
    def is_in_memory(self) -> bool:
        return self.way == IN_MEMORY

    def make_model(self) -> nn.Module:
        model = MLP(10, (1, 28, 28)) if self.model == "MLP" else CNN(10)
        if self.is_in_memory and self.model == "CNN":
            return model.to(memory_format=torch.channels_last)
        return model

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        fused = True if self.is_in_memory else None
        return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=fused)

    def batches(self) -> Epochs:
        """Return what most sides iterate over."""
        return Epochs(InMemory(self) if self.is_in_memory else self.data_loader(), self.pace)

    def data_loader(self) -> DataLoader[Batch]:
        """Return the data as PyTorch's quickstart loads them."""
        return DataLoader(self.torchvision_mnist(), BATCH_SIZE, shuffle=True)

    def torchvision_mnist(self) -> Subset[Batch]:
        steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
        digits = torchvision.datasets.MNIST(str(self.mnist), transform=steps)
        return Subset(digits, range(self.steps * BATCH_SIZE))


class InMemory:
    """Shuffled batches of digits that are bytes in memory."""

    def __init__(self, work: Work) -> None:
        self.images, self.labels = mnist(train=True).tensors
        self.steps = work.steps
        self.format = torch.channels_last if work.model == "CNN" else torch.contiguous_format

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        for batch in torch.randperm(len(self.images))[: self.steps * BATCH_SIZE].split(BATCH_SIZE):
            images = self.images[batch].float().div_(255).sub_(MEAN).div_(STD)
            yield images.contiguous(memory_format=self.format), self.labels[batch]


class Epochs(IterableDataset[Batch]):
    """Batches whose epochs begin when they may."""

    def __init__(self, batches: InMemory | DataLoader[Batch], pace: Callable[[], None]) -> None:
        self.batches = batches
        self.pace = pace

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        self.pace()
        yield from self.batches


class IterationLog:
    """A CSV file with a row per iteration, for sides that have none of their own."""

    def __init__(self, folder: Path) -> None:
        self.writer = csv.writer((folder / "iterations.csv").open("w"))

    def __call__(self, loss: float, accuracy: float) -> None:
        self.writer.writerow([loss, accuracy])


def batch_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float().mean()


def train_bare(work: Work) -> None:
    """Train as PyTorch's tutorials do."""
    model, batches = work.make_model(), work.batches()
    optimizer = work.make_optimizer(model)
    model.train()
    while True:
        for images, labels in batches:
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def train_bare_with_log(work: Work) -> None:
    """Train as above, and record each iteration."""
    model, batches = work.make_model(), work.batches()
    optimizer, log = work.make_optimizer(model), IterationLog(work.folder)
    model.train()
    while True:
        for images, labels in batches:
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            log(loss.item(), batch_accuracy(logits, labels).item())


def train_ours(work: Work) -> None:
    """Train with this program, as its command line does, in both ways alike."""
    overrides = (
        *(f"model={work.model.lower()}", "data=mnist", f"data.batch_size={BATCH_SIZE}"),
        *("scheduler=constant", f"optimizer.lr={LR}", f"optimizer.weight_decay={WEIGHT_DECAY}"),
        f"trainer.limit_train_batches={work.steps}",
    )
    epoch = our_epoch(work.folder, overrides)
    while True:
        work.pace()
        epoch()


def train_with_lightning(work: Work) -> None:
    """Train as in "Lightning in 15 minutes"."""
    import lightning as L
    from lightning.pytorch.loggers import CSVLogger

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = work.make_model()

        def training_step(self, batch: Batch, _: int) -> Tensor:
            images, labels = batch
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels)
            values = {"loss": loss, "accuracy": batch_accuracy(logits, labels)}
            self.log_dict(values, prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return work.make_optimizer(self)

    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=CSVLogger(str(work.folder)),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), work.batches())


def train_with_ignite(work: Work) -> None:
    """Train as in Ignite's quickstart."""
    from ignite.engine import Engine, Events, create_supervised_trainer
    from ignite.handlers import ProgressBar

    def values(_: Tensor, labels: Tensor, logits: Tensor, loss: Tensor) -> dict[str, float]:
        return {"loss": loss.item(), "accuracy": batch_accuracy(logits, labels).item()}

    def write(engine: Engine) -> None:
        log(engine.state.output["loss"], engine.state.output["accuracy"])

    model, log = work.make_model(), IterationLog(work.folder)
    trainer = create_supervised_trainer(
        model, work.make_optimizer(model), F.cross_entropy, output_transform=values
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, write)
    ProgressBar().attach(trainer, output_transform=lambda output: output)
    trainer.run(work.batches(), max_epochs=FOREVER)


def train_with_accelerate(work: Work) -> None:
    """Train as in Accelerate's quicktour."""
    from accelerate import Accelerator

    accelerator, log = Accelerator(cpu=True), IterationLog(work.folder)
    model = work.make_model()
    batches = work.batches()
    if isinstance(batches.batches, DataLoader):
        batches = Epochs(accelerator.prepare(batches.batches), work.pace)
    model, optimizer = accelerator.prepare(model, work.make_optimizer(model))
    model.train()
    while True:
        for images, labels in batches:
            optimizer.zero_grad()
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            accelerator.backward(loss)
            optimizer.step()
            log(loss.item(), batch_accuracy(logits, labels).item())


def train_with_keras(work: Work) -> None:
    """Train with `fit`; the tutorial is "Simple MNIST convnet", whose data are NumPy arrays."""
    os.environ |= {"KERAS_BACKEND": "torch", "KERAS_HOME": str(work.folder)}
    import keras

    class Log(keras.callbacks.Callback):
        def on_epoch_begin(self, _epoch: int, _logs: Any = None) -> None:
            if not work.is_in_memory:
                work.pace()

        def on_train_batch_end(self, _batch: int, logs: dict[str, float]) -> None:
            write(float(logs["loss"]), float(logs["accuracy"]))

    write = IterationLog(work.folder)
    model = keras.Sequential(
        [keras.layers.TorchModuleWrapper(work.make_model(), output_shape=(None, 10))]
    )
    model.compile(
        optimizer=keras.optimizers.AdamW(LR, weight_decay=WEIGHT_DECAY, epsilon=1e-8),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    if work.is_in_memory:
        batches = DataLoader(work.batches(), batch_size=None)
        model.fit(batches, epochs=FOREVER, callbacks=[Log()])
    else:
        images, labels = mnist(train=True).tensors
        count = work.steps * BATCH_SIZE
        x, y = ((images[:count].float() / 255 - MEAN) / STD).numpy(), labels[:count].numpy()
        model.fit(x, y, batch_size=BATCH_SIZE, epochs=FOREVER, callbacks=[Log()])


def train_with_torchmanager(work: Work) -> None:
    """Train as in torchmanager's README, which reads the data through a `Dataset` of its own."""
    import torchmanager
    from torchmanager.callbacks import Callback
    from torchmanager.data import Dataset
    from torchmanager.metrics import metric

    class Log(Callback):
        def on_epoch_start(self, _epoch: int) -> None:
            if not work.is_in_memory:
                work.pace()

        def on_batch_end(self, _batch: int, summary: dict[str, float]) -> None:
            write(summary["loss"], summary["accuracy"])

    class Digits(Dataset):
        def __init__(self) -> None:
            super().__init__(BATCH_SIZE, shuffle=True)
            self.digits = work.torchvision_mnist()

        @property
        def unbatched_len(self) -> int:
            return len(self.digits)

        def __getitem__(self, index: int) -> Batch:
            sample: Batch = self.digits[index]
            return sample

    model, write = work.make_model(), IterationLog(work.folder)
    manager = torchmanager.Manager(
        model,
        work.make_optimizer(model),
        loss_fn=torchmanager.losses.CrossEntropy(),
        metrics={"accuracy": metric(batch_accuracy)},
    )
    data = work.batches() if work.is_in_memory else Digits()
    manager.fit(data, FOREVER, callbacks_list=[Log()], show_verbose=True)


@dataclass(frozen=True)
class Side:
    """One of the sides.

    Attributes:
        train: Trains epoch after epoch.
        records: What it records of each iteration.
        package: Its distribution; None if nothing has to be installed.
    """

    train: Callable[[Work], None]
    records: str
    package: str | None = None


OWN_CALLBACK = "running means, by a callback of one's own; bar"
SIDES = {
    BARE: Side(train_bare, "nothing"),
    "bare loop with a log": Side(train_bare_with_log, "loss, accuracy: a line of one's own"),
    OURS: Side(train_ours, "loss, accuracy, learning rate, times: its CSV; bar"),
    "Lightning": Side(train_with_lightning, "loss, accuracy: its CSVLogger; bar", "lightning"),
    "Ignite": Side(
        train_with_ignite, "loss, accuracy: a handler of one's own; bar", "pytorch-ignite"
    ),
    "Accelerate": Side(train_with_accelerate, "loss, accuracy: a line of one's own", "accelerate"),
    "Keras on torch": Side(train_with_keras, OWN_CALLBACK, "keras"),
    "torchmanager": Side(train_with_torchmanager, OWN_CALLBACK, "torchmanager"),
}
