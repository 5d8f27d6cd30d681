"""Secrets from environment variables: used by the run, and never saved, logged or shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from app.config.secrets import looks_secret
from app.distributed.launch.failures import RankFailure
from app.runtime.errors import ConfigError
from app.training.checkpoint.checkpoint import load_checkpoint
from tests.support.runs import RunResult, config_issues, job_for

TOKEN = "hunter2-hunter2"
CALLBACK_MODULE = """
from app.training.events import Callback


class Tracker(Callback):
    def __init__(self, api, url, config, folder):
        with open("calls.txt", "a") as file:
            file.write(f"{api} {url} {'@' in str(config)} ")
        self.message = f"{api} is wrong"

    def on_run_end(self, history):
        import os
        if "BREAK" in os.environ:
            raise RuntimeError(self.message)
"""
OVERRIDES = (
    *("+callbacks.tracker._target_=tracker.Tracker", "trusted_targets=[tracker]"),
    *("+callbacks.tracker.api=${oc.env:MY_API_TOKEN}", "+callbacks.tracker.url=${oc.env:MY_URL}"),
    *("+tags=['a ${callbacks.tracker.api}']", "model=mlp", "debug=fast"),
)


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [
        *((name, True) for name in ("WANDB_API_KEY", "HF_TOKEN", "db_password", "AUTH", "secret")),
        *((name, True) for name in ("AWS_SECRET_ACCESS_KEY", "credentials", "key", "OPENAI-KEY")),
        *(
            (name, False)
            for name in ("APP_DATA", "HOME", "KEYBOARD", "author", "monkey", "path", "PWD")
        ),
    ],
)
def test_looks_secret_recognizes_names_of_secrets(name: str, is_secret: bool) -> None:
    assert looks_secret(name) is is_secret


def test_secret_is_passed_to_callback_but_never_saved(
    app: Callable[..., RunResult], tmp_path: Path
) -> None:
    (tmp_path / "tracker.py").write_text(CALLBACK_MODULE)
    environment = {"MY_API_TOKEN": TOKEN, "MY_URL": "http://tracker"}
    ran = app(*OVERRIDES, **environment)
    assert ran.code == 0, ran.err + ran.out
    assert (tmp_path / "calls.txt").read_text().startswith(f"{TOKEN} http://tracker")
    assert files_containing(tmp_path / "outputs", TOKEN) == []
    assert TOKEN not in ran.out + ran.err
    assert ran.config["callbacks"]["tracker"]["api"] == "${oc.env:MY_API_TOKEN}"
    assert ran.config["callbacks"]["tracker"]["url"] == "http://tracker"
    assert ran.config["tags"] == ["a ${oc.env:MY_API_TOKEN}"]
    saved = load_checkpoint(ran.folder / "checkpoints" / "best.safetensors").config
    assert saved is not None
    assert TOKEN not in str(saved)
    overrides = (f"ckpt={ran.folder}", "mode=test", "trusted_targets=[tracker]")
    not_allowed = app(*overrides, MY_API_TOKEN="another-token", MY_URL="http://tracker")
    assert not_allowed.code == 2
    assert (
        "the saved run reads this variable; to allow it, add ++callbacks.tracker.api="
        in not_allowed.err
    )
    overrides = (*overrides, "++callbacks.tracker.api=${oc.env:MY_API_TOKEN}")
    missing = app(*overrides, MY_URL="http://tracker")
    assert missing.code == 2
    assert "callbacks.tracker.api" in missing.err
    assert "'MY_API_TOKEN' not found" in missing.err
    again = app(*overrides, MY_API_TOKEN="another-token", MY_URL="http://tracker")
    assert again.code == 0, again.err
    assert "another-token http://tracker" in (tmp_path / "calls.txt").read_text()
    assert files_containing(tmp_path / "outputs", "another-token") == []


def test_sweep_never_saves_secret(app: Callable[..., RunResult], tmp_path: Path) -> None:
    (tmp_path / "tracker.py").write_text(CALLBACK_MODULE)
    ran = app("-m", *OVERRIDES, "seed=0,1", MY_API_TOKEN=TOKEN, MY_URL="http://tracker", BREAK="1")
    assert ran.code == 1
    assert "is wrong" in ran.out + ran.err
    assert TOKEN not in ran.out + ran.err
    assert files_containing(tmp_path / "outputs", TOKEN) == []
    (base,) = tmp_path.glob("outputs/sweeps/*/*/.sweep/base.yaml")
    assert yaml.safe_load(base.read_text())["callbacks"]["tracker"]["url"] == "http://tracker"


def files_containing(folder: Path, text: str) -> list[Path]:
    """Return the files below the folder that contain the text."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if text.encode() in path.read_bytes()]


def test_errors_do_not_reveal_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", TOKEN)
    (issue,) = config_issues("optimizer.lr=${oc.env:MY_API_TOKEN}")
    assert "optimizer.lr='${oc.env:MY_API_TOKEN}' is not valid" in issue
    failure = RankFailure.from_exception(0, RuntimeError(f"{TOKEN} is wrong"))
    assert TOKEN not in failure.error + failure.trace


def test_path_from_environment_is_not_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DATA", "/my/data")
    assert job_for("data=cifar10").plain["data"]["source"]["train"]["root"] == "/my/data"


def test_env_copy_of_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", TOKEN)
    with pytest.raises(ConfigError, match=r"env_set\.MY_API_TOKEN would be saved with the run"):
        config_issues("hydra.job.env_copy=[MY_API_TOKEN]")
