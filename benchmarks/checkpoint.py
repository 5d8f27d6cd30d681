"""Measure the cost of saving a checkpoint as a share of the epoch time.

    python -m benchmarks.checkpoint

The same training runs three times in each round: with a checkpoint after every epoch (written
synchronously, then in the background) and with a single checkpoint at the end. The script prints
the median over the rounds and the median of the per-round ratios, because absolute times on a
shared machine say little.

- small: an MLP with 0.1 million parameters, 60 steps of 128 samples.
- large: an MLP with 20 million parameters, 20 steps; a checkpoint takes 240 MB.
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
from benchmarks.tables import Table, add_output_option, publish

QUICK = ("--rounds", "1")
EPOCHS = 4
MODELS = {"small": ("[128]", 60), "large": ("[4096,4096]", 20)}  # hidden sizes, steps per epoch
BASELINE = "only at the end"
SAVE_MODES = {
    BASELINE: ("checkpoint.every_n_epochs=1000",),
    "synchronous": (),
    "background": ("checkpoint.asynchronous=true",),
}


def time_training(hidden: str, steps: int, overrides: tuple[str, ...]) -> tuple[float, int]:
    """Return the training time in seconds and the size of the last checkpoint in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        experiment = compose(
            [
                "model=mlp",
                f"model.hidden={hidden}",
                f"trainer.max_epochs={EPOCHS}",
                f"trainer.limit_train_batches={steps}",
                "trainer.limit_valid_batches=1",
                "goal.metric=train/loss",  # best.safetensors is written equally often in each mode
                "goal.mode=max",
                "callbacks={}",
                *overrides,
            ],
            folder,
        )
        with experiment:
            start = time.perf_counter()
            experiment.trainer.fit(experiment.loaders["train"])
            elapsed = time.perf_counter() - start
        return elapsed, (Path(folder) / CHECKPOINT_DIR / LAST_CHECKPOINT).stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    add_output_option(parser)
    options = parser.parse_args()
    rounds = options.rounds
    logging.disable()
    rows = []
    for model, (hidden, steps) in MODELS.items():
        times: dict[str, list[float]] = {mode: [] for mode in SAVE_MODES}
        size = 0
        for _ in range(rounds + 1):
            for mode, overrides in SAVE_MODES.items():
                elapsed, size = time_training(hidden, steps, overrides)
                times[mode].append(elapsed)
        baseline = times[BASELINE][1:]  # the first round is a warm-up
        for mode in SAVE_MODES:
            epoch = statistics.median(times[mode][1:]) / EPOCHS
            costs = [
                (total - base) / (EPOCHS - 1) / (base / EPOCHS)
                for total, base in zip(times[mode][1:], baseline, strict=True)
            ]
            share = describe_shares(costs) if mode != BASELINE else ""
            rows.append(
                {
                    "model": model,
                    "checkpoint (MB)": size / 1e6,
                    "saving": mode,
                    "s per epoch": epoch,
                    "cost of a save / epoch (quartiles)": share,
                }
            )
    notes = [f"{rounds} rounds, {EPOCHS} epochs each, {torch.get_num_threads()} threads."]
    publish([Table("checkpoint", "Saving a checkpoint", rows, notes)], options.out)


def describe_shares(shares: list[float]) -> str:
    """Return the median and the quartiles in per cent."""
    if len(shares) < 2:
        return f"{shares[0]:.1%}"
    low, middle, high = statistics.quantiles(shares, method="inclusive")
    return f"{middle:.1%} ({low:.1%} to {high:.1%})"


if __name__ == "__main__":
    main()
