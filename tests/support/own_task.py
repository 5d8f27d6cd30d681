"""Tasks: batches and outputs of any form, own steps, several optimizers; and what goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

# ---- by configuration


OWN = """
from app.task import Step, SupervisedTask


class Doubled(SupervisedTask):
    def __init__(self, model, loss, metrics, precision, factor: float = 1.0) -> None:
        super().__init__(model, loss, metrics, precision)
        self.factor = factor

    def eval_step(self, stage, batch):
        inputs, targets = self.unpack(batch)
        outputs = self.forward(inputs)
        loss, _ = self.loss(outputs, targets)
        return self.step_output(stage, outputs, targets, self.factor * loss)


class Noisy(SupervisedTask):
    def __init__(self, noise: float, **parts) -> None:
        super().__init__(**parts)
        self.noise = noise


class Broken(SupervisedTask):
    def eval_step(self, stage, batch):
        return {"a": 1}["b"]
"""
FEW = ("--config-dir", "conf", "model=mlp", "debug=fast", "trusted_targets=[own_task]")


@pytest.fixture
def own_task(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (elsewhere / "own_task.py").write_text(OWN)
    (elsewhere / "conf" / "task").mkdir(parents=True)
    (elsewhere / "conf" / "task" / "own.yaml").write_text("_target_: own_task.Doubled\nfactor: 2.0")
    monkeypatch.syspath_prepend(elsewhere)
    return elsewhere
