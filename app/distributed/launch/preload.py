"""Imported only by the fork server that ranks are forked from, so that it survives signals.

A signal to the whole process group is meant for the run. The ranks end together with the fork
server, so it must stay alive until they have handled the signal and saved a checkpoint.
"""

from __future__ import annotations

import os
import signal

os.setpgid(0, 0)
for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
