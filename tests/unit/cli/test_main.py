"""Exit codes and messages of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig

from app.cli import report
from app.cli.main import main, parse_arguments
from app.runtime.errors import StorageError

TOO_LONG = "x" * 300  # file systems allow 255 bytes


def test_main_and_report_too_long_path_is_one_error(
    tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["app", "-m", f"sweep.resume={TOO_LONG}"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert report.main([TOO_LONG]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.endswith("cannot be read: File name too long") for line in lines] == [0, 1, 1]
    (tmp_cwd / "status.json").write_text('{"status": "running"}')
    assert report.main([str(tmp_cwd), "--to", TOO_LONG]) == StorageError.exit_code
    assert "cannot be written: File name too long" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["check", "train"])
def test_main_single_run_composes_its_configuration_once(
    tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    compositions, runs = [], []
    compose = ConfigLoaderImpl.load_configuration

    def counting_compose(self: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> DictConfig:
        compositions.append(args)
        return compose(self, *args, **kwargs)

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", counting_compose)
    monkeypatch.setattr("app.cli.main.run_job", lambda config, **_: runs.append(config))
    monkeypatch.setattr("sys.argv", ["app", "model=mlp", f"mode={mode}"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert len(compositions) == 1
    assert [run.model.input_shape for run in runs] == [[1, 28, 28]] * (mode == "train")
    assert (tmp_cwd / "outputs").exists() == (mode == "train")


@pytest.mark.parametrize(
    "line", ["-m model=mlp seed=0,1", "model=mlp -m seed=0,1", "model=mlp seed=0,1 -m"]
)
def test_options_may_stand_among_overrides(line: str) -> None:
    args, _ = parse_arguments(line.split())
    assert args.multirun
    assert args.overrides == ["model=mlp", "seed=0,1"]
