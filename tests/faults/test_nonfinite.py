"""Losses and gradients that are no numbers: no step is made of them, whatever then follows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests.support.processes import status_of, write_tainted
from tests.support.runs import Ran
from tests.support.sweeps import Sweeps

# ---- as users meet it

FEW = ("model=mlp", "data=tainted", "trainer.max_epochs=2", "goal.metric=loss")
MORE = ("goal.mode=min", "trainer.sanity_valid_batches=0", "trusted_targets=[faulty]")


def tainted(folder: Path) -> tuple[str, ...]:
    write_tainted(folder / "conf")
    return ("--config-dir", str(folder / "conf"), *FEW, *MORE)


@pytest.mark.parametrize(
    ("policy", "code", "state", "steps"),
    [("stop", 65, "diverged", 3), ("skip", 0, "completed", 5), ("raise", 65, "failed", None)],
)
def test_exit_code_and_status(
    app: Callable[..., Ran], tmp_path: Path, policy: str, code: int, state: str, steps: int | None
) -> None:
    words = tainted(tmp_path)
    ran = app(*words, f"trainer.on_nonfinite={policy}", "data.sampling=null", "seed=1")
    assert ran.code == code, ran.err
    assert ran.status["status"] == state
    first = ran.status["nonfinite"]["first"]
    assert (first["stage"], first["epoch"], first["where"]) == ("train", 1, "the batch itself")
    assert 13 in first["samples"]
    assert (ran.folder / "test_summary_table.csv").exists() == (steps is not None)
    details = ran.folder / "epoch_details" / "epoch001_train.csv"
    if steps is None:
        assert not details.exists()
        return
    found = pd.read_csv(details)["loss"]
    assert len(found) == (first["step"] if policy == "stop" else 5)
    assert np.flatnonzero(np.isnan(found)).tolist() == [first["step"] - 1]


def test_in_a_sweep_it_is_over(sweep: Sweeps, tmp_path: Path) -> None:
    words = tainted(tmp_path)
    flags, policies = ("-m", *words[:2]), ("trainer.on_nonfinite=stop,skip", "hydra.sweep.dir=s")
    assert sweep(*words[2:], *policies, short=False, flags=flags) == 0
    table = pd.read_csv(tmp_path / "s" / "sweep.csv")
    assert table["status"].tolist() == ["diverged", "completed"]
    log = tmp_path / "s" / "sweep.log"
    before = log.read_text().count("job 0 ")
    assert sweep("sweep.resume=s", short=False, flags=flags) == 0
    assert log.read_text().count("job 0 ") == before  # it is not begun again


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(("policy", "state"), [("stop", "diverged"), ("skip", "completed")])
def test_ranks_decide_alike_and_name_whose_samples(
    ranks: Callable[..., Path], tmp_path: Path, policy: str, state: str, strategy: str
) -> None:
    words = tainted(tmp_path)
    more = (
        f"trainer.on_nonfinite={policy}",
        "trainer.limit_train_batches=null",
        "trainer.timeout=60",
        f"trainer.strategy={strategy}",
    )
    folder = ranks("none:0:0", *words[2:-1], *more, flags=words[:2])
    status = status_of(folder)
    first = status["nonfinite"]["first"]
    assert (status["status"], first["kind"]) == (state, "loss")
    place = first["samples"].index(13)
    assert first["rank"] == (place >= len(first["samples"]) / 2)
    weights = torch.load(folder / "model.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert json.dumps(first)
