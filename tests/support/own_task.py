"""Tasks of a user's own module, chosen by configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

OWN_TASK_MODULE = """
from app.training.supervised import SupervisedTask


class ScaledLossTask(SupervisedTask):
    def __init__(self, model, loss, metrics, precision, factor: float = 1.0) -> None:
        super().__init__(model, loss, metrics, precision)
        self.factor = factor

    def eval_step(self, stage, batch):
        inputs, targets = self.unpack(batch)
        outputs = self.forward(inputs)
        loss, _ = self.loss(outputs, targets)
        return self.step_output(stage, outputs, targets, self.factor * loss)


class NoisyTask(SupervisedTask):
    def __init__(self, noise: float, **kwargs) -> None:
        super().__init__(**kwargs)
        self.noise = noise


class BrokenTask(SupervisedTask):
    def eval_step(self, stage, batch):
        return {"a": 1}["b"]
"""
SCALED_LOSS_YAML = "_target_: own_task.ScaledLossTask\nfactor: 2.0"
OWN_TASK_ARGUMENTS = (
    "--config-dir",
    "conf",
    "model=mlp",
    "debug=fast",
    "~callbacks.plots",
    "trusted_targets=[own_task]",
)


def write_own_task(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the module `own_task` and its configuration `task=own` to a folder, and return it."""
    (folder / "own_task.py").write_text(OWN_TASK_MODULE)
    (folder / "conf" / "task").mkdir(parents=True)
    (folder / "conf" / "task" / "own.yaml").write_text(SCALED_LOSS_YAML)
    monkeypatch.syspath_prepend(folder)
    return folder
