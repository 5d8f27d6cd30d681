"""Imported by the process that ranks are forked from, and by no other: it has to outlive signals.

Whoever asks a whole process group to stop means the run; ranks that learn of it must still be
there to save what they have, and they end with the process that they come from.
"""

from __future__ import annotations

import os
import signal

os.setpgid(0, 0)
for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
