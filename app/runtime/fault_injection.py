"""Places at which tests end the program, to see that nothing is lost there."""

from __future__ import annotations

import os
import signal

VARIABLE = "APP_FAULT"  # place:file:number, as before_rename:last.pt:2; off where it is not set


def maybe_crash(place: str, file: str) -> None:
    """Ends this process at once, where it has come to that place for the wanted time.

    Args:
        place: `opened`, `mid_write`, `before_fsync`, `after_fsync`, `before_rename`,
            `after_rename`, `before_old_moves` or `before_old_goes`.
        file: The name of the file that is written.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    at, name, number = wanted.rsplit(":", 2)
    if at != place or name not in file:
        return
    os.environ[VARIABLE] = f"{at}:{name}:{int(number) - 1}"
    if int(number) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
