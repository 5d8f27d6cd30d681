"""`python -m benchmarks` on a folder of benchmarks that take no time."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import main

WORKING = """
import sys
from pathlib import Path

QUICK = ("--rounds", "1")

def main():
    *options, _, out = sys.argv[1:]
    Path(out, "sizes.md").write_text(f"## Sizes\\n\\nmeasured with {options}\\n")
    Path(out, "sizes.csv").write_text("size\\n1\\n")

main()
"""
FAILING = "def main():\n    raise ValueError('no luck')\n\nmain()\n"
SKIPPED = (
    "from benchmarks.tables import skip\n\ndef main():\n    skip('no CUDA device')\n\nmain()\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A package of benchmarks: one fails, one is skipped, one works."""
    folder = tmp_path / "fake_benchmarks"
    folder.mkdir()
    modules = {"a_failing": FAILING, "b_skipped": SKIPPED, "c_working": WORKING}
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    return folder


def test_main_after_a_failing_benchmark_runs_the_others_and_returns_1(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = folder.parent / "out"
    assert main(["--quick", "--out", str(out)], folder) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[-3:] == [
        "failed: a_failing (ValueError: no luck)",
        "skipped: b_skipped (no CUDA device)",
        "completed: c_working",
    ]
    page = (out / "benchmarks.md").read_text()
    assert "`a_failing` failed: ValueError: no luck" in page
    assert "measured with ['--rounds', '1']" in page
    assert "`python -m fake_benchmarks.c_working --rounds 1`:" in page
    assert (out / "sizes.csv").read_text() == "size\n1\n"


def test_main_without_a_failure_returns_0(folder: Path) -> None:
    assert main(["b_skipped", "c_working", "--out", str(folder.parent / "out")], folder) == 0
