"""mode=export: the same outputs without this program."""

from __future__ import annotations

from pathlib import Path

import torch

from app.experiment.run import execute
from tests.support.runs import Ran, job_for, mistakes_in


def test_a_run_is_exported_from_the_command_line(trained: Ran, tmp_path: Path) -> None:
    execute(job_for("mode=export", f"ckpt={trained.folder}"), tmp_path)
    from safetensors.torch import load_file

    expected = torch.load(trained.folder / "model.pt", weights_only=True)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    (mistake,) = mistakes_in("mode=export", f"ckpt={trained.folder}", "export.format=onx")
    assert "did you mean 'onnx'" in mistake
