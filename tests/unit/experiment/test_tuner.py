"""Search for a learning rate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from app.config.schema import TunerConfig
from app.data.loaders import make_loader
from app.experiment.tuner import find_learning_rate, steepest_lr
from app.runtime.errors import UserError
from tests.support.runs import config_issues
from tests.support.toy_training import DATA, make_mlp, make_trainer


def test_steepest_lr_is_where_the_loss_falls_fastest() -> None:
    lr = np.geomspace(1e-5, 1.0, 50)
    loss = 2.0 - 1 / (1 + np.exp(-4 * np.log(lr / 1e-2)))
    table = pd.DataFrame({"lr": lr, "smoothed_loss": loss})
    assert steepest_lr(table) == pytest.approx(1e-2, rel=0.3)
    with pytest.raises(UserError, match="never falls"):
        steepest_lr(table.assign(smoothed_loss=lr))


def test_find_learning_rate_tries_increasing_rates_until_the_loss_diverges(
    tmp_path: Path,
) -> None:
    trainer = make_trainer(tmp_path, make_mlp())
    find = TunerConfig(1e-4, 1e3, 40, 64, 2)
    (group,) = trainer.optimizers.single.optimizer.param_groups
    group["lr_scale"] = 0.5  # as a parameter group may have
    found = find_learning_rate(trainer.task, make_loader(DATA, 16), find, tmp_path)
    table = pd.read_csv(tmp_path / "find_lr.csv")
    assert 1e-4 < found < 100
    assert table["lr"].iloc[:3].tolist() == pytest.approx(list(np.geomspace(1e-4, 1e3, 40)[:3]))
    assert len(table) <= 40
    assert group["lr"] == pytest.approx(0.5 * table["lr"].iloc[-1])
    assert (tmp_path / "find_lr.png").read_bytes().startswith(b"\x89PNG")


def test_config_with_invalid_finder_options_is_rejected() -> None:
    (issue,) = config_issues("find.lr_from=1", "find.lr_to=0.1")
    assert issue == "find.lr_from=1 must be below find.lr_to=0.1"
    assert any("ckpt" in issue for issue in config_issues("mode=find_lr", "ckpt=x"))
