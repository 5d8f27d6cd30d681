"""Non-finite losses and gradients: exit codes, status, sweeps and several ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests.support.processes import status_of, write_tainted_data
from tests.support.runs import RunResult
from tests.support.sweeps import RunSweep

TAINTED_DATA = ("model=mlp", "data=tainted", "trainer.max_epochs=2", "goal.metric=loss")
OPTIONS = ("goal.mode=min", "trainer.sanity_valid_batches=0", "trusted_targets=[faulty]")


def tainted_arguments(folder: Path) -> tuple[str, ...]:
    """Write data of which one training sample is NaN, and return the arguments to train on it."""
    write_tainted_data(folder / "conf")
    return ("--config-dir", str(folder / "conf"), *TAINTED_DATA, *OPTIONS)


@pytest.mark.parametrize(
    ("policy", "code", "state", "steps"),
    [("stop", 65, "diverged", 3), ("skip", 0, "completed", 5), ("raise", 65, "failed", None)],
)
def test_nan_sample_sets_exit_code_and_status_by_policy(
    app: Callable[..., RunResult],
    tmp_path: Path,
    policy: str,
    code: int,
    state: str,
    steps: int | None,
) -> None:
    arguments = tainted_arguments(tmp_path)
    result = app(*arguments, f"trainer.on_nonfinite={policy}", "data.sampling=null", "seed=1")
    assert result.code == code, result.err
    assert result.status["status"] == state
    first = result.status["nonfinite"]["first"]
    assert (first["stage"], first["epoch"], first["where"]) == ("train", 1, "the batch itself")
    assert 13 in first["samples"]
    assert (result.folder / "test_summary_table.csv").exists() == (steps is not None)
    details = result.folder / "epoch_details" / "epoch001_train.csv"
    if steps is None:
        assert not details.exists()
        return
    losses = pd.read_csv(details)["loss"]
    assert len(losses) == (first["step"] if policy == "stop" else 5)
    assert np.flatnonzero(np.isnan(losses)).tolist() == [first["step"] - 1]


def test_sweep_resume_does_not_repeat_diverged_jobs(sweep: RunSweep, tmp_path: Path) -> None:
    arguments = tainted_arguments(tmp_path)
    flags, policies = (
        ("-m", *arguments[:2]),
        ("trainer.on_nonfinite=stop,skip", "hydra.sweep.dir=s"),
    )
    assert sweep(*arguments[2:], *policies, short=False, flags=flags) == 0
    table = pd.read_csv(tmp_path / "s" / "sweep.csv")
    assert table["status"].tolist() == ["diverged", "completed"]
    log = tmp_path / "s" / "sweep.log"
    before = log.read_text().count("job 0 ")
    assert sweep("sweep.resume=s", short=False, flags=flags) == 0
    assert log.read_text().count("job 0 ") == before


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(("policy", "state"), [("stop", "diverged"), ("skip", "completed")])
def test_ranks_agree_on_nan_and_name_the_rank_of_the_sample(
    run_ranks: Callable[..., Path], tmp_path: Path, policy: str, state: str, strategy: str
) -> None:
    arguments = tainted_arguments(tmp_path)
    overrides = (
        f"trainer.on_nonfinite={policy}",
        "trainer.limit_train_batches=null",
        "trainer.timeout=60",
        f"trainer.strategy={strategy}",
    )
    folder = run_ranks("none:0:0", *arguments[2:-1], *overrides, flags=arguments[:2])
    status = status_of(folder)
    first = status["nonfinite"]["first"]
    assert (status["status"], first["kind"]) == (state, "loss")
    index = first["samples"].index(13)
    assert first["rank"] == (index >= len(first["samples"]) / 2)
    weights = torch.load(folder / "model.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert json.dumps(first)
