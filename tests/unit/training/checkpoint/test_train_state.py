"""Saving the state of training."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from torch import nn

from app.training.checkpoint.checkpoint import load_checkpoint
from app.training.checkpoint.train_state import TrainState, gather_to_cpu
from app.training.events import Callback
from app.training.limits import SaveSchedule
from app.training.nonfinite import NonFinitePolicy
from app.training.optim.weight_averaging import WeightAveraging
from app.training.supervised import SupervisedTask


def test_save_best_in_background_ignores_later_changes(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    task = SupervisedTask(model, nn.MSELoss())
    schedule = SaveSchedule(in_background=True)
    nonfinite, averaging = NonFinitePolicy(task), WeightAveraging(model)
    state = TrainState(task, averaging, tmp_path, None, nonfinite, Callback(), schedule)
    expected, may_write = model.weight.detach().clone(), threading.Event()
    state.writer.submit(lambda: may_write.wait(60) and None)
    state.save_best()
    model.weight.data.zero_()
    may_write.set()
    state.writer.wait()
    assert torch.equal(load_checkpoint(tmp_path).model["weight"], expected)


def test_gather_to_cpu_copies_tied_tensors_once() -> None:
    tied, empty = torch.ones(3), torch.empty(0)
    state = {"encoder": tied, "decoder": [tied.detach()], "view": tied[:2], "none": [empty, empty]}
    copied = gather_to_cpu(state, copies=True)
    assert copied["encoder"] is copied["decoder"][0]
    tied.zero_()
    assert copied["encoder"].tolist() == [1, 1, 1]
    assert copied["view"].tolist() == [1, 1]
