"""Measure how long the program takes to start, against what it cannot do without.

    python benchmarks/startup.py

Two pairs of commands alternate for several rounds: `app --help` against the `--help` of a Hydra
application that does nothing, and a whole run of one batch per stage against importing torch,
torchvision and torchmetrics. The script prints medians and the median ratio, because absolute
times on a shared machine say little. The last column has the targets.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def print_row(what: str, pairs: list[tuple[float, float]], target: float) -> None:
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = sorted(one / other for one, other in pairs)
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    ratio = statistics.median(ratios)
    print(f"| {what} | {ours:.2f} | {theirs:.2f} | {ratio:.2f} | {spread} | {target} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
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
        print("| what | ours (s) | theirs (s) | ratio | from, to | target |")
        print("| --- | --- | --- | --- | --- | --- |")
        for what, (ours, theirs, target) in comparisons.items():
            pairs = [(seconds(ours, folder), seconds(theirs, folder)) for _ in range(rounds + 1)]
            print_row(what, pairs[1:], target)  # the first round is a warm-up


if __name__ == "__main__":
    main()
