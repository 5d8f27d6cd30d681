"""Measure how long the program takes to start, against what it cannot do without.

    python -m benchmarks.startup

Two pairs of commands alternate for several rounds: `app --help` against the `--help` of a Hydra
application that does nothing, and a whole run of one batch per stage against importing torch,
torchvision and torchmetrics. The script prints medians and the median ratio, because absolute
times on a shared machine say little. The last column has the targets.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.overhead import Summary, alternate, summarize
from benchmarks.tables import Table, add_output_option, publish

QUICK = ("--rounds", "1")
BARE_HYDRA = """
import hydra

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    pass

main()
"""
IMPORTS = "import torch, torchvision, torchmetrics"
ONE_BATCH_RUN = ["-m", "app", "model=mlp", "trainer.fast_dev_run=true"]


def seconds(arguments: list[str], folder: Path) -> float:
    """Return the wall-clock seconds of a Python command, which must succeed."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    add_output_option(parser)
    options = parser.parse_args()
    rows: list[Summary] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "bare.py").write_text(BARE_HYDRA)
        (folder / "conf").mkdir()
        (folder / "conf" / "config.yaml").write_text("size: 1\n")
        comparisons = {
            "`app --help` / bare Hydra `--help`": (
                ["-m", "app", "--help"],
                ["bare.py", "--help"],
                1.5,
            ),
            "a run of one batch per stage / imports": (ONE_BATCH_RUN, ["-c", IMPORTS], 1.3),
        }
        for what, (ours, theirs, target) in comparisons.items():
            sides: dict[str, Callable[[], float]] = {
                "ours": partial(seconds, ours, folder),
                "theirs": partial(seconds, theirs, folder),
            }
            times = alternate(options.rounds, sides)
            summary = summarize(times["ours"], times["theirs"])
            rows.append({"seconds of": what, **summary, "target": f"<= {target}"})
    publish([Table("startup", "Starting", rows)], options.out)


if __name__ == "__main__":
    main()
