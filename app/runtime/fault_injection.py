"""Crash points for tests that check that no data is lost when the process dies while writing."""

from __future__ import annotations

import os
import signal

FAULT_VARIABLE = "APP_FAULT"  # place:file:count, such as before_rename:last.safetensors:2


def maybe_crash(place: str, file: str) -> None:
    """Kill this process if `APP_FAULT` names this place and file, at the given occurrence.

    Args:
        place: `opened`, `mid_write`, `before_fsync`, `after_fsync`, `before_rename`,
            `after_rename`, `before_move_old` or `before_remove_old`.
        file: Name of the file being written.
    """
    fault = os.environ.get(FAULT_VARIABLE)
    if fault is None:
        return
    fault_place, name, count = fault.rsplit(":", 2)
    if fault_place != place or name not in file:
        return
    os.environ[FAULT_VARIABLE] = f"{fault_place}:{name}:{int(count) - 1}"
    if int(count) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
