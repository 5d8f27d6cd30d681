"""Exit codes and messages of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.cli import report
from app.cli.main import main
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
