"""Imported by the fork server of the tests, to prepare once what every command needs.

The processes that it forks find in memory: the digits of MNIST, the caches of Hydra's parsers, the
components that a configuration may name, and the fonts of the plots.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from matplotlib.figure import Figure

from app.data.mnist import mnist

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support.runs import job_for

num_threads = torch.get_num_threads()
torch.set_num_threads(1)  # the threads of a pool would be missing in a forked process
job_for("model=mlp")
HydraConfig.instance().cfg = None
mnist(train=True)
mnist(train=False)
Figure().subplots().figure.savefig(io.BytesIO(), format="png")
torch.set_num_threads(num_threads)
