"""Freezing of parameters by pattern and epoch."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from app.config.schema import FreezeConfig
from app.data.loaders import make_loader
from app.runtime.errors import UserError
from app.training.optim.freezing import FreezeSchedule, matches
from tests.support.toy_training import DATA, make_mlp, make_trainer


def test_frozen_parameters_change_only_in_the_epochs_in_which_they_are_not_frozen(
    tmp_path: Path,
) -> None:
    model = make_mlp(batchnorm=True)
    rules = {
        "first": FreezeConfig("0", until_epoch=2),
        "norm": FreezeConfig("1"),
        "last": FreezeConfig("3.bias", 2),
    }
    trainer = make_trainer(tmp_path, model, freezing=FreezeSchedule(model, rules))
    states = [copy.deepcopy(model.state_dict())]
    on_epoch_end = trainer.steps.averaging.on_epoch_end

    def record_state(epoch: int) -> None:
        states.append(copy.deepcopy(model.state_dict()))
        on_epoch_end(epoch)

    trainer.steps.averaging.on_epoch_end = record_state  # type: ignore[method-assign]
    trainer.fit(make_loader(DATA, 8))

    def has_changed(name: str) -> list[bool]:
        return [not torch.equal(a[name], b[name]) for a, b in pairwise(states)]

    assert has_changed("0.weight") == [False, True, True]
    assert has_changed("1.weight") == has_changed("1.running_mean") == [False, False, False]
    assert has_changed("3.weight") == [True, True, True]
    assert has_changed("3.bias") == [True, False, False]


def test_pattern_matches_modules_and_wildcards_and_is_rejected_if_it_matches_nothing() -> None:
    assert matches("layer1.0.weight", "layer1")
    assert matches("layer1.0.weight", "layer*.weight")
    assert not matches("layer10.weight", "layer1")
    with pytest.raises(
        UserError, match=r"freeze\.x\.parameters='lair' matches no parameter.*'layer'"
    ):
        FreezeSchedule(nn.ModuleDict({"layer": nn.Linear(2, 2)}), {"x": FreezeConfig("lair")})
