"""The wheel works outside the source tree, and the console script runs and completes overrides."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution as an installer would."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        assert not any("/outputs/" in name for name in archive.getnames())
    (path,) = out.glob("*.whl")
    return path


def test_wheel_contains_configs_and_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    configs = {f"app/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert {name for name in configs if "/local/" not in name} <= names
    assert sum(name.endswith(".gz") for name in names) == 4
    assert "app/data/mnist/LICENSE.md" in names


def test_wheel_trains_outside_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, timeout=120)
    environment = os.environ | {"PYTHONPATH": str(site)}
    code = "import app; print(app.__file__)"
    imported = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert imported.stdout.startswith(str(site))
    result = subprocess.run(
        [sys.executable, "-m", "app", "model=lenet", "debug=fast"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("outputs/*/*_lenet_mnist/model.pt"))) == 1


def console_script() -> Path:
    path = Path(sys.executable).with_name("app")
    assert path.is_file(), "the console script is not installed"
    return path


def test_console_script_checks_configuration(tmp_path: Path) -> None:
    result = subprocess.run(
        [console_script(), "mode=check", "model=lenet"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (0, "the configuration is valid\n")


def test_console_script_completes_overrides(tmp_path: Path) -> None:
    environment = os.environ | {"COMP_LINE": "app model=al", "COMP_POINT": "12"}
    result = subprocess.run(
        [console_script(), "-sc", "query=bash"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "model=alexnet" in result.stdout.split()
