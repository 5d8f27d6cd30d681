"""`mode=export` from the command line."""

from __future__ import annotations

from pathlib import Path

import torch

from app.experiment.run import execute
from tests.support.runs import RunResult, config_issues, job_for


def test_mode_export_writes_the_weights_of_a_run(trained_run: RunResult, tmp_path: Path) -> None:
    execute(job_for("mode=export", f"ckpt={trained_run.folder}"), tmp_path)
    from safetensors.torch import load_file

    expected = torch.load(trained_run.folder / "model.pt", weights_only=True)
    exported = load_file(tmp_path / "model.safetensors")
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())


def test_mode_export_with_unknown_format_suggests_nearest(trained_run: RunResult) -> None:
    arguments = ("mode=export", f"ckpt={trained_run.folder}", "export.format=onx")
    (issue,) = config_issues(*arguments)
    assert "did you mean 'onnx'" in issue
