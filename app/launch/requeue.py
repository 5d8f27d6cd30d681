"""A run that SLURM has preempted is put back into its queue."""

from __future__ import annotations

import logging
import os
import subprocess

log = logging.getLogger(__name__)


def requeue() -> None:
    """Asks SLURM to start this job again; what it cannot do is in the log."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        log.error("trainer.requeue=True, but this is no job of SLURM: SLURM_JOB_ID is not set")
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}".format_map(os.environ)
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        log.error("trainer.requeue=True, but there is no scontrol here; start it again by hand")
    except subprocess.CalledProcessError as error:
        log.error("scontrol requeue %s failed: %s", job, error.stderr.strip())
    else:
        log.info("SLURM will start job %s again", job)
