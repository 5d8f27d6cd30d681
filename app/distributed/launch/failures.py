"""What became of the ranks of a run: who failed first, and why."""

from __future__ import annotations

import logging
import signal
import sysconfig
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from app.config.secrets import redact_text
from app.runtime.errors import ERRORS_BY_EXIT_CODE, StorageError, UserError
from app.runtime.files import read_status, write_json
from app.runtime.signals import StopReason, TrainingInterrupted

log = logging.getLogger(__name__)
Kind = Literal["error", "user", "stopped", "interrupted", "lost", "timeout", "died"]
TRANSPORTS = ("gloo", "NCCL", "distributed")  # in what is said where ranks talk to each other
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "Connection refused",
    "Software caused connection abort",
    "remote process exited",
)
TIMEOUT = (
    "Application timeout caused pair closure",
    "Timed out waiting",
    "wait timeout after",
    "collective operation timeout",
)


class RankFailedError(Exception):
    """A rank has ended as it should not.

    Args:
        failure: Of the rank with which it began.
    """

    def __init__(self, failure: RankFailure) -> None:
        super().__init__(f"rank {failure.rank}: {failure.error}")
        self.failure = failure


@dataclass(frozen=True)
class RankFailure:
    """How a rank failed.

    Attributes:
        rank: Its number.
        kind: `lost` and `timeout` follow from the failure of another.
        error: In a line.
        trace: Where it happened.
        reason: Why it stopped, where it did.
        when: In seconds, on a clock of all ranks of a machine.
        code: The exit code that a user's mistake ends with.
    """

    rank: int
    kind: Kind
    error: str
    trace: str = ""
    reason: int = StopReason.NONE
    when: float = field(default_factory=time.time)
    code: int = UserError.exit_code

    @classmethod
    def from_exception(cls, rank: int, error: BaseException) -> RankFailure:
        """Of an exception that has ended the rank."""
        reason = error.reason if isinstance(error, TrainingInterrupted) else StopReason.NONE
        trace = redact_text("".join(traceback.format_exception(error)))
        code = error.exit_code if isinstance(error, UserError) else UserError.exit_code
        return cls(rank, kind_of(error), redact_text(one_line(error)), trace, reason, code=code)

    @classmethod
    def from_exit_code(cls, rank: int, code: int | None) -> RankFailure:
        """Of a rank that is gone without a word."""
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return cls(rank, "died", f"it was killed by {name}{hint}")
        return cls(rank, "died", f"it ended with exit code {code}")

    def to_exception(self) -> BaseException:
        """As an exception."""
        if self.kind == "user":
            return ERRORS_BY_EXIT_CODE[self.code](self.error)
        if self.kind == "stopped":
            return TrainingInterrupted(StopReason(self.reason))
        return KeyboardInterrupt() if self.kind == "interrupted" else RankFailedError(self)


def root_exception(error: BaseException) -> BaseException:
    """What had gone wrong already when whoever starts ranks asked the others to stop."""
    before = error.__context__
    if (
        isinstance(error, TrainingInterrupted)
        and isinstance(before, Exception)
        and not _was_at_home(before)
    ):
        return before
    return error


def _was_at_home(error: Exception) -> bool:
    """Whether it had not left the library that raised it, which may well have dealt with it."""
    if error.__traceback__ is None:
        return False
    frame = error.__traceback__.tb_frame
    if str(frame.f_globals.get("__name__")).startswith("app."):
        return False
    paths = sysconfig.get_paths()
    homes = (paths["stdlib"], paths["purelib"], paths["platlib"], "<frozen")
    return frame.f_code.co_filename.startswith(homes)


def one_line(error: BaseException) -> str:
    """The error as one reads it in `status.json`."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def kind_of(error: BaseException) -> Kind:
    """Whether an exception is a cause, or follows from the end of another rank."""
    if isinstance(error, TrainingInterrupted):
        return "stopped"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__
    texts = [str(one) for one in chain]
    if any(word in text for text in texts for word in TIMEOUT):
        return "timeout"
    if any(word in text and _is_of_ranks(text) for text in texts for word in LOST):
        return "lost"
    return "user" if isinstance(error, UserError) else "error"


def _is_of_ranks(text: str) -> bool:
    """Not of a file or a server that a user's own code has lost."""
    return any(transport in text for transport in TRANSPORTS)


def root_failure(failures: Sequence[RankFailure], size: int, timeout: float) -> RankFailure:
    """The failure with which it began.

    Args:
        failures: Of the ranks that told, or died.
        size: How many ranks there are.
        timeout: After which they no longer wait for one another.
    """
    first = sorted(failures, key=lambda failure: failure.when)
    causes = [failure for failure in first if failure.kind not in ("lost", "timeout")]
    if causes:
        return causes[0]
    silent = sorted({*range(size)} - {failure.rank for failure in failures})
    waited = [failure for failure in first if failure.kind == "timeout"]
    if waited and silent:
        names = ", ".join(map(str, silent))
        error = f"it has not answered for {timeout:g} s (trainer.timeout); silent: rank {names}"
        return RankFailure(silent[0], "timeout", error, waited[0].trace)
    if silent:
        return RankFailure(silent[0], "died", "it is gone without a word", first[0].trace)
    return (waited or first)[0]


def record_rank_failure(folder: Path, failure: RankFailure) -> None:
    """`status.json` says `failed`, with the rank and why, whatever rank 0 could still write."""
    path = folder / "status.json"
    content = read_status(folder)
    state = {"stopped": "preempted", "interrupted": "interrupted"}.get(failure.kind, "failed")
    if failure.kind == "stopped":
        state = TrainingInterrupted(StopReason(failure.reason)).state
    now = datetime.now(UTC).isoformat(timespec="seconds")
    error = f"rank {failure.rank}: {failure.error}" if state == "failed" else None
    rank = failure.rank if state == "failed" else None
    content |= {"status": state, "updated": now, "error": error, "rank": rank}
    try:
        write_json(path, content)
    except StorageError as full:  # what it ended by is what has to be said
        log.error("%s", full)
