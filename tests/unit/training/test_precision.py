"""Names of precisions, and models whose weights are bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.experiment.run import execute
from app.training.precision import Precision
from tests.support.fitting import fit
from tests.support.runs import config_issues, job_for

CPU = torch.device("cpu")
FEW = ("model=mlp", "trainer.limit_train_batches=3", "trainer.limit_valid_batches=2")
ONE_EPOCH = (*FEW, "data.batch_size=50", "trainer.max_epochs=1")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("auto", "fp32"),
        (32, "fp32"),
        ("32-true", "fp32"),
        ("bf16-mixed", "bf16"),
        ("16-mixed", "fp16"),
        ("16", "fp16"),
        ("bf16-true", "bf16-true"),
    ],
)
def test_choose_understands_the_names_of_lightning(name: str | int, expected: str) -> None:
    assert Precision.choose(name, CPU) == Precision(expected, "cpu")


def test_config_accepts_each_name_and_names_the_nearest() -> None:
    (issue,) = config_issues("model=mlp", "trainer.precision=bf16-tru")
    assert issue.endswith("did you mean 'bf16-true'?")
    strategy = ("trainer.strategy=fsdp", "model=mlp")
    (issue,) = config_issues(*strategy, "trainer.precision=16-mixed")
    assert issue.startswith("trainer.precision='16-mixed' is not supported with trainer.strategy")
    assert config_issues("model=mlp", "trainer.precision=32") == []


def test_bf16_true_trains_bfloat16_weights_with_float32_losses(tmp_path: Path) -> None:
    trainer, recorder = fit(tmp_path, *ONE_EPOCH, "trainer.precision=bf16-true")
    model = trainer.task.model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(torch.randn(2, 1, 28, 28)).dtype == torch.float32
    reference, expected = fit(tmp_path / "b", *ONE_EPOCH, "trainer.precision=32-true")
    assert next(reference.task.model.parameters()).dtype == torch.float32
    losses = [end.results[-1].row["loss_mean"] for end in (recorder, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_matmul_precision_is_that_of_the_job(tmp_path: Path) -> None:
    overrides = (*ONE_EPOCH, "trainer.fast_dev_run=true")
    for precision in ("medium", "highest"):
        execute(job_for(*overrides, f"trainer.matmul_precision={precision}"), tmp_path / precision)
        assert torch.get_float32_matmul_precision() == precision
