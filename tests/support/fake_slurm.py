"""A stand-in for SLURM on this machine: sbatch, srun, sacct and scontrol, as submitit calls them.

It runs batch scripts for real, their arrays all at once, and starts a job again that asks for it.
It knows nothing of nodes, limits and queues, and sends no signals by itself.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "scontrol")
JOB = "4242"
STEP = {  # the variables of one task of a step of two
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_TASKS_PER_NODE": "2",
}


def install(folder: Path) -> None:
    """The commands, in a folder that belongs on `PATH`; what they are told is kept there, too."""
    folder.mkdir()
    for name in COMMANDS:
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        script.chmod(0o755)


def sbatch(here: Path, script: str) -> None:
    (here / "script").write_text(Path(script).read_text())
    array = re.search(r"--array=0-(\d+)", (here / "script").read_text())
    for number in range(int(array[1]) + 1) if array else [None]:
        words = [
            sys.executable,
            __file__,
            "job",
            script,
            *([] if number is None else [str(number)]),
        ]
        log = (here / "log").open("a")
        subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
    sys.stdout.write(f"Submitted batch job {JOB}\n")


def job(here: Path, script: str, number: str | None = None) -> None:
    name = JOB if number is None else f"{JOB}_{number}"
    array = {"SLURM_ARRAY_JOB_ID": JOB, "SLURM_ARRAY_TASK_ID": str(number)} if number else {}
    known = {"SLURM_JOB_ID": str(int(JOB) + int(number or 0)), "SLURM_JOB_NUM_NODES": "1", **array}
    again, begun = here / f"again-{name}", 0
    while begun == 0 or again.exists():
        again.unlink(missing_ok=True)
        begun += 1
        code = subprocess.call(["bash", script], env=os.environ | known)
    (here / f"ended-{name}").write_text(f"{'FAILED' if code else 'COMPLETED'} {begun}")


def srun(here: Path, *words: str) -> None:
    command = list(words[words.index(sys.executable) :])
    files = dict(pairwise(words))
    job, number = (os.environ.get(f"SLURM_ARRAY_{name}_ID", JOB) for name in ("JOB", "TASK"))
    known = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "1"}
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    for descriptor, name in ((1, "--output"), (2, "--error")):
        path = files[name]
        for pattern, text in (("%A", job), ("%a", number), ("%j", JOB), ("%t", "0")):
            path = path.replace(pattern, text)
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    (here / f"process-{number}").write_text(str(os.getpid()))
    os.execvpe(command[0], command, os.environ | known | step)


def sacct(here: Path, *words: str) -> None:  # noqa: ARG001
    lines = ["JobID|State|NodeList"]
    for path in here.glob("process-*"):
        name = JOB if path.name == f"process-{JOB}" else f"{JOB}_{path.name.partition('-')[2]}"
        ended = here / f"ended-{name}"
        state = ended.read_text().split()[0] if ended.exists() else "RUNNING"
        lines.append(f"{name}|{state}|here")
    sys.stdout.write("\n".join(lines) + "\n")


def scontrol(here: Path, what: str, name: str) -> None:
    assert what == "requeue"
    (here / f"again-{name}").touch()


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(os.environ["FAKE_SLURM"]), *sys.argv[2:])
