"""The wheel works elsewhere; the console script completes words."""

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
    """Built from the source distribution, as an installer would."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        assert not any("/outputs/" in name for name in archive.getnames())
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_holds_configs_and_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    here = {f"app/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert {name for name in here if "/local/" not in name} <= names
    assert sum(name.endswith(".gz") for name in names) == 4
    assert "app/data/mnist/LICENSE.md" in names


def test_the_wheel_runs_where_the_project_is_not(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, timeout=120)
    environment = os.environ | {"PYTHONPATH": str(site)}
    code = "import app; print(app.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert where.stdout.startswith(str(site))
    ran = subprocess.run(
        [sys.executable, "-m", "app", "model=lenet", "debug=fast"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert len(list(tmp_path.glob("outputs/*/*_lenet_mnist/model.pt"))) == 1


def script() -> Path:
    found = Path(sys.executable).with_name("app")
    assert found.is_file(), "the console script is not installed"
    return found


def test_the_console_script_runs(tmp_path: Path) -> None:
    ran = subprocess.run(
        [script(), "mode=check", "model=lenet"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (0, "no mistake in the configuration\n")


def test_words_are_completed(tmp_path: Path) -> None:
    environment = os.environ | {"COMP_LINE": "app model=al", "COMP_POINT": "12"}
    ran = subprocess.run(
        [script(), "-sc", "query=bash"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "model=alexnet" in ran.stdout.split()
