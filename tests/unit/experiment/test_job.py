"""Making a job from a composed configuration."""

from __future__ import annotations

import pytest

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
