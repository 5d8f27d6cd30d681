"""What saving costs, as a share of the epoch.

    python benchmarks/checkpoint.py

The same training with a save after every epoch, written at once and in the background, and with a
single one at its end. They take turns in each round; medians of rounds and of their ratios are
printed, since absolute times on a shared machine say little.

- small: an MLP of 0.1 million parameters, 60 steps of 128 samples.
- large: an MLP of 20 million parameters, 20 steps; its state takes 240 MB.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path

import torch

from app.experiment.notebook import compose
from app.training.checkpoint.rotation import CHECKPOINT_DIR, LAST_CHECKPOINT

EPOCHS = 4
MODELS = {"small": ("[128]", 60), "large": ("[4096,4096]", 20)}  # layers, steps of an epoch
WAYS = {
    "none but the last": ("checkpoint.every_n_epochs=1000",),
    "at once": (),
    "in the background": ("checkpoint.asynchronous=true",),
}


def seconds(hidden: str, steps: int, words: tuple[str, ...]) -> tuple[float, int]:
    """Of the training, and the bytes of its last state."""
    with tempfile.TemporaryDirectory() as folder:
        experiment = compose(
            [
                "model=mlp",
                f"model.hidden={hidden}",
                f"trainer.max_epochs={EPOCHS}",
                f"trainer.limit_train_batches={steps}",
                "trainer.limit_valid_batches=1",
                "goal.metric=train/loss",  # best.pt is written as often in every way
                "goal.mode=max",
                "callbacks={}",
                *words,
            ],
            folder,
        )
        with experiment:
            began = time.perf_counter()
            experiment.trainer.fit(experiment.loaders["train"])
            took = time.perf_counter() - began
        return took, (Path(folder) / CHECKPOINT_DIR / LAST_CHECKPOINT).stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    logging.disable()
    threads = torch.get_num_threads()
    print(f"{rounds} rounds, {EPOCHS} epochs each, {threads} threads")
    print("| model | state | saved | s an epoch | a save, of the epoch |")
    print("| --- | --- | --- | --- | --- |")
    for model, (hidden, steps) in MODELS.items():
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        size = 0
        for _ in range(rounds + 1):
            for way, words in WAYS.items():
                took, size = seconds(hidden, steps, words)
                times[way].append(took)
        base = times["none but the last"][1:]  # the first round warms up
        for way in WAYS:
            epoch = statistics.median(times[way][1:]) / EPOCHS
            more = [
                (one - other) / (EPOCHS - 1) / (other / EPOCHS)
                for one, other in zip(times[way][1:], base, strict=True)
            ]
            share = f"{statistics.median(more):.1%}" if way != "none but the last" else ""
            print(f"| {model} | {size / 1e6:.1f} MB | {way} | {epoch:.3f} | {share} |", flush=True)


if __name__ == "__main__":
    main()
