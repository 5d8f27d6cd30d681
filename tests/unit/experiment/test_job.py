"""Making a job from a composed configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.runtime.errors import UserError
from tests.support.runs import config_issues


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["resume=true"],
            "resume=True: allowed: null, auto, a run folder, a training checkpoint in one",
        ),
        (
            ["resume=[a]"],
            "resume=['a']: allowed: null, auto, a run folder, a training checkpoint in one",
        ),
        (
            ["resume=''"],
            "resume='': allowed: null, auto, a run folder, a training checkpoint in one",
        ),
        (["resume='${nope}'"], "resume does not resolve: Interpolation key 'nope' not found"),
        (["mode=test", "ckpt=1"], "ckpt=1: allowed: null, a run folder, a checkpoint file"),
        (["mode=test", "ckpt="], "ckpt='': allowed: null, a run folder, a checkpoint file"),
        (["ckpt=[a]"], "ckpt=['a']: allowed: null, a run folder, a checkpoint file"),
        (
            ["init.weights=3"],
            "init.weights=3: allowed: null, a run folder, a checkpoint, a .pt or .safetensors file",
        ),
        (["sweep.resume=true"], "sweep.resume=True: allowed: null, the folder of a sweep"),
    ],
)
def test_make_job_path_of_wrong_type_is_refused(overrides: list[str], message: str) -> None:
    (issue,) = config_issues("model=mlp", *overrides)
    text, _, hint = issue.partition("; quote a name that is no plain word: ")
    key = message.partition("=")[0]
    assert text == message
    assert hint in ("", f"\"{key}='...'\"")
    assert bool(hint) == ("allowed" in message and "=''" not in message)


@pytest.mark.parametrize("mode", ["train", "check", "find_lr"])
def test_make_job_without_the_initial_weights_names_the_nearest_file(
    tmp_cwd: Path, mode: str
) -> None:
    (tmp_cwd / "net.pt").touch()
    assert config_issues("model=mlp", f"mode={mode}", "init.weights=nets.pt", "seed=-1") == [
        f"init.weights='{tmp_cwd / 'nets.pt'}' does not exist; allowed: a run folder, a "
        "checkpoint, a .pt or .safetensors file; did you mean 'net.pt'?",
        "seed=-1 is not valid; allowed: an integer of at least 0 and at most 9223372036854775807",
    ]


def test_make_job_foreign_weights_as_checkpoint_names_what_they_can_be_used_for(
    tmp_cwd: Path,
) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_cwd / "old.pt")
    hint = f"a new training can start from its weights: init.weights={tmp_cwd / 'old.pt'}"
    (issue,) = config_issues("model=mlp", "resume=old.pt")
    assert issue == f"resume='old.pt' is not a checkpoint of a run; {hint}"
    with pytest.raises(UserError) as error:
        config_issues("model=mlp", "mode=test", "ckpt=old.pt")
    assert str(error.value).startswith(f"{tmp_cwd / 'old.pt'} is truncated or not a checkpoint: ")
    assert str(error.value).endswith(f"; {hint}")
    (issue,) = config_issues("model=mlp", "ckpt=old.pt")
    assert issue == (
        f"ckpt='{tmp_cwd / 'old.pt'}' is not used in mode=train; allowed: mode=test, mode=valid, "
        "mode=predict, mode=export; to start a new training from its weights: "
        f"init.weights={tmp_cwd / 'old.pt'}"
    )
