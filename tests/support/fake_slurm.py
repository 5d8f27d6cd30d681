"""Fake SLURM on this machine: sbatch, srun, sacct and scontrol, as submitit calls them.

It runs batch scripts as processes, all tasks of an array at once, and supports requeueing. It has
no nodes, limits or queues, and sends no signals.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "scontrol")
JOB_ID = "4242"
STEP_VARIABLES = {  # of each task in a step of two
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_TASKS_PER_NODE": "2",
}


def install(folder: Path) -> None:
    """Write the commands to a folder that belongs on `PATH`."""
    folder.mkdir()
    for name in COMMANDS:
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        script.chmod(0o755)


def sbatch(here: Path, script: str) -> None:
    (here / "script").write_text(Path(script).read_text())
    array = re.search(r"--array=0-(\d+)", (here / "script").read_text())
    for number in range(int(array[1]) + 1) if array else [None]:
        arguments = [script] if number is None else [script, str(number)]
        command = [sys.executable, __file__, "run_job", *arguments]
        log = (here / "log").open("a")
        subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    sys.stdout.write(f"Submitted batch job {JOB_ID}\n")


def run_job(here: Path, script: str, number: str | None = None) -> None:
    name = JOB_ID if number is None else f"{JOB_ID}_{number}"
    array = {"SLURM_ARRAY_JOB_ID": JOB_ID, "SLURM_ARRAY_TASK_ID": str(number)} if number else {}
    job_id = str(int(JOB_ID) + int(number or 0))
    variables = {"SLURM_JOB_ID": job_id, "SLURM_JOB_NUM_NODES": "1", **array}
    requeued, starts = here / f"requeued-{name}", 0
    while starts == 0 or requeued.exists():
        requeued.unlink(missing_ok=True)
        starts += 1
        code = subprocess.call(["bash", script], env=os.environ | variables)
    (here / f"ended-{name}").write_text(f"{'FAILED' if code else 'COMPLETED'} {starts}")


def srun(here: Path, *arguments: str) -> None:
    command = list(arguments[arguments.index(sys.executable) :])
    options = dict(pairwise(arguments))
    job, number = (os.environ.get(f"SLURM_ARRAY_{name}_ID", JOB_ID) for name in ("JOB", "TASK"))
    variables = {
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": "1",
    }
    variables |= {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    for descriptor, option in ((1, "--output"), (2, "--error")):
        path = options[option]
        for pattern, text in (("%A", job), ("%a", number), ("%j", JOB_ID), ("%t", "0")):
            path = path.replace(pattern, text)
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    (here / f"process-{number}").write_text(str(os.getpid()))
    os.execvpe(command[0], command, os.environ | variables)


def sacct(here: Path, *arguments: str) -> None:  # noqa: ARG001
    lines = ["JobID|State|NodeList"]
    for path in here.glob("process-*"):
        number = path.name.partition("-")[2]
        name = JOB_ID if number == JOB_ID else f"{JOB_ID}_{number}"
        ended = here / f"ended-{name}"
        state = ended.read_text().split()[0] if ended.exists() else "RUNNING"
        lines.append(f"{name}|{state}|here")
    sys.stdout.write("\n".join(lines) + "\n")


def scontrol(here: Path, action: str, name: str) -> None:
    assert action == "requeue"
    (here / f"requeued-{name}").touch()


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(os.environ["FAKE_SLURM"]), *sys.argv[2:])
