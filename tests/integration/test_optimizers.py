"""Optimizers and parameter groups of a configuration."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from torch import nn

from app.config.instantiate import Instantiator
from app.experiment.optimizer_parts import OptimizerPart, check_step
from app.experiment.run import check_samples, execute
from app.runtime.errors import UserError
from app.runtime.memory import keep_freed_memory
from app.runtime.wait_policy import adaptive_wait_policy
from tests.support.fitting import build_trainer
from tests.support.runs import job_for

SHORT = ("model=lenet", "debug=fast", "data.batch_size=16")
CONVS = "+optimizer.groups.convs={module_type: Conv2d, lr_scale: 0.1, betas: [0.8, 0.9]}"
MUON_ON_CONVOLUTIONS = (
    "optimizer.groups.matrices: Muon is for the weight matrices of hidden layers, and LeNet has "
    "none: its hidden layers that are trained have weights of 4 dimensions (convolutions); choose "
    "another optimizer, such as optimizer=adamw or optimizer=sgd"
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["optimizer=sparse_adam"],
            "SparseAdam cannot train 'features.0.weight' (4 dimensions, dense gradients): ",
        ),
        (["optimizer._target_=torch.optim.Muon"], "optimizer: torch.optim.Muon cannot train"),
        (["optimizer._target_=torch.optim.Muon"], "optimizer=muon trains all but matrices with"),
        (["optimizer=muon", "+freeze.a={parameters: classifier}"], MUON_ON_CONVOLUTIONS),
        (["+optimizer.groups.a={parameters: clasifier}"], "did you mean 'classifier'?"),
    ],
)
def test_mode_check_says_what_an_optimizer_cannot_train(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        check_samples(job_for(*SHORT, "mode=check", *overrides))
    assert message in str(refused.value)


def test_optimizer_that_does_not_fit_fails_before_any_callback_is_built(tmp_path: Path) -> None:
    """As other parts that do not fit together: nothing but the status of the run is written."""
    job = job_for("debug=fast", "model=cnn", "optimizer=muon", "data.batch_size=16")
    with pytest.raises(UserError, match=r"^optimizer\.groups\.matrices: Muon is for"):
        execute(job, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_optimizers_are_tried_with_gradients_as_sparse_as_those_of_the_model() -> None:
    model = nn.Sequential(nn.Embedding(3, 2, sparse=True), nn.Linear(2, 2))

    def check(target: str, layer: int) -> None:
        parameters = dict(model[layer].named_parameters())
        group = {"params": [*parameters.values()], "param_names": [*parameters]}
        check_step(Instantiator(), OptimizerPart("optimizer", {"_target_": target}, [group]), model)

    check("torch.optim.SparseAdam", 0)
    check("torch.optim.AdamW", 1)
    with pytest.raises(
        UserError, match=r"'weight' \(2 dimensions, sparse gradients\): .*Adam does not support"
    ):
        check("torch.optim.AdamW", 0)


@pytest.mark.parametrize(
    ("overrides", "logged"),
    [
        (["optimizer=sgd"], "SGD (fused)"),
        (["optimizer=sgd", "optimizer.nesterov=false", "+optimizer.dampening=0.1"], "SGD"),
        (["+optimizer.foreach=true"], "AdamW"),
        (["optimizer=rmsprop"], "RMSprop"),
    ],
)
def test_run_logs_its_fused_optimizer_kept_memory_and_wait_policy(
    overrides: list[str], logged: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fixed = ("model=mlp", "debug=fast", "trainer.accelerator=cpu")
    with caplog.at_level("INFO"):
        execute(job_for(*fixed, *overrides), tmp_path)
    names = [m.split(maxsplit=1)[1] for m in caplog.messages if m.startswith("optimizer ")]
    assert names == [logged]
    assert ("freed memory is kept" in caplog.text) == keep_freed_memory()
    with adaptive_wait_policy() as adapts:
        assert ("those that wait sleep" in caplog.text) == adapts


def test_run_with_groups_lists_them_and_has_a_column_for_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        execute(job_for(*SHORT, "optimizer=muon", CONVS, "scheduler=constant"), tmp_path)
    steps = pd.read_csv(tmp_path / "epoch_details" / "epoch001_train.csv")
    rates = {name: steps[name].tolist() for name in steps if name.startswith("lr")}
    assert rates == {
        "lr": [1e-3] * 2,
        "lr_matrices": [1e-3] * 2,
        "lr_convs": pytest.approx([1e-4] * 2),
    }
    groups = pd.read_csv(tmp_path / "parameter_groups.csv").set_index("parameter")
    assert groups["group"].value_counts().to_dict() == {"convs": 4, "default": 4, "matrices": 2}
    assert groups["optimizer"]["classifier.1.weight"] == "Muon"
    assert groups["optimizer"]["classifier.5.weight"] == "AdamW"
    (line,) = [line for line in caplog.text.splitlines() if line.strip().startswith("convs")]
    assert line.split()[:6] == ["convs", "AdamW", "0.0001", "0.01", "2,572", "features.0.weight,"]


def test_arguments_of_a_group_reach_its_optimizer_only(tmp_path: Path) -> None:
    job = job_for(*SHORT, "optimizer=muon", CONVS, "optimizer.lr_base_size=8")
    trainer, _ = build_trainer(job, tmp_path)
    default, convs, matrices = trainer.optimizers.single.optimizer.param_groups
    assert (default["betas"], convs["betas"]) == ((0.9, 0.999), [0.8, 0.9])
    assert matrices["adjust_lr_fn"] == "match_rms_adamw"
    assert "betas" not in matrices
    assert [group["base_lr"] for group in (default, convs, matrices)] == pytest.approx(
        [2e-3, 2e-4, 2e-3]  # 16 samples per step, twice `lr_base_size`
    )


def test_schedule_of_one_rate_keeps_the_ratio_of_groups(tmp_path: Path) -> None:
    trainer, _ = build_trainer(job_for(*SHORT, CONVS, "scheduler=onecycle"), tmp_path)
    groups = trainer.optimizers.single.optimizer.param_groups
    assert [group["max_lr"] for group in groups] == pytest.approx([1e-3, 1e-4])


def test_resume_with_other_groups_is_refused(tmp_path: Path) -> None:
    execute(job_for(*SHORT), tmp_path)
    trainer, _ = build_trainer(job_for(*SHORT, CONVS), tmp_path)
    with pytest.raises(UserError) as refused:
        trainer.resume(tmp_path / "checkpoints" / "last.safetensors")
    assert (
        "the parameter 'features.0.weight' was in group 0 (default) and is in group 1 (convs) now"
    ) in str(refused.value)
