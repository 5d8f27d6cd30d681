"""Describe how ranks failed, and find the failure that caused the others."""

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
FailureKind = Literal["error", "user", "stopped", "interrupted", "lost", "timeout", "died"]
TRANSPORT_NAMES = ("gloo", "NCCL", "distributed")  # in the messages of failed collectives
CONNECTION_LOST_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "Connection refused",
    "Software caused connection abort",
    "remote process exited",
)
TIMEOUT_MESSAGES = (
    "Application timeout caused pair closure",
    "Timed out waiting",
    "wait timeout after",
    "collective operation timeout",
)
NO_REPORT = "exited without reporting an error"


class RankFailedError(Exception):
    """A rank has failed, with the failure that caused all others."""

    def __init__(self, failure: RankFailure) -> None:
        super().__init__(f"rank {failure.rank}: {failure.error}")
        self.failure = failure


@dataclass(frozen=True)
class RankFailure:
    """How a rank failed.

    Attributes:
        rank: The rank.
        kind: `lost` and `timeout` are consequences of the failure of another rank.
        error: Message in one line.
        trace: Stack trace.
        reason: Why the rank was asked to stop, if it was.
        timestamp: Seconds since the epoch.
        exit_code: Exit code of a `UserError`.
    """

    rank: int
    kind: FailureKind
    error: str
    trace: str = ""
    reason: int = StopReason.NONE
    timestamp: float = field(default_factory=time.time)
    exit_code: int = UserError.exit_code

    @classmethod
    def from_exception(cls, rank: int, error: BaseException) -> RankFailure:
        """Describe the exception that has ended a rank."""
        reason = error.reason if isinstance(error, TrainingInterrupted) else StopReason.NONE
        trace = redact_text("".join(traceback.format_exception(error)))
        exit_code = error.exit_code if isinstance(error, UserError) else UserError.exit_code
        text = redact_text(format_error(error))
        return cls(rank, classify_error(error), text, trace, reason, exit_code=exit_code)

    @classmethod
    def from_exit_code(cls, rank: int, code: int | None) -> RankFailure:
        """Describe a rank whose process ended without reporting an error."""
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return cls(rank, "died", f"killed by {name}{hint}")
        return cls(rank, "died", f"exited with code {code}")

    def to_exception(self) -> BaseException:
        """Return the exception to raise in the parent process."""
        if self.kind == "user":
            return ERRORS_BY_EXIT_CODE[self.exit_code](self.error)
        if self.kind == "stopped":
            return TrainingInterrupted(StopReason(self.reason))
        return KeyboardInterrupt() if self.kind == "interrupted" else RankFailedError(self)


def format_error(error: BaseException) -> str:
    """Return the message for `status.json`."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def classify_error(error: BaseException) -> FailureKind:
    """Tell whether an exception is a cause or a consequence of the failure of another rank."""
    if isinstance(error, TrainingInterrupted):
        return "stopped"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__
    texts = [str(exception) for exception in chain]
    if any(message in text for text in texts for message in TIMEOUT_MESSAGES):
        return "timeout"
    # User code that talks to a server may lose its connection as well.
    from_ranks = [text for text in texts if any(name in text for name in TRANSPORT_NAMES)]
    if any(message in text for text in from_ranks for message in CONNECTION_LOST_MESSAGES):
        return "lost"
    return "user" if isinstance(error, UserError) else "error"


def root_exception(error: BaseException) -> BaseException:
    """Return the error that was being handled when a stop signal arrived, else `error` itself.

    When a rank fails, the launcher asks all ranks to stop. That signal must not hide the failure.
    """
    context = error.__context__
    if (
        isinstance(error, TrainingInterrupted)
        and isinstance(context, Exception)
        and not _was_raised_in_library(context)
    ):
        return context
    return error


def _was_raised_in_library(error: Exception) -> bool:
    """Whether an error had not left the library that raised it, which may have handled it."""
    if error.__traceback__ is None:
        return False
    frame = error.__traceback__.tb_frame
    if str(frame.f_globals.get("__name__")).startswith("app."):
        return False
    paths = sysconfig.get_paths()
    library_paths = (paths["stdlib"], paths["purelib"], paths["platlib"], "<frozen")
    return frame.f_code.co_filename.startswith(library_paths)


def root_failure(failures: Sequence[RankFailure], world_size: int, timeout: float) -> RankFailure:
    """Return the failure that caused the others.

    Args:
        failures: Failures of the ranks that reported one or died.
        world_size: Number of ranks.
        timeout: Seconds after which ranks stop waiting for each other.
    """
    ordered = sorted(failures, key=lambda failure: failure.timestamp)
    causes = [failure for failure in ordered if failure.kind not in ("lost", "timeout")]
    if causes:
        return causes[0]
    unresponsive = sorted({*range(world_size)} - {failure.rank for failure in failures})
    timeouts = [failure for failure in ordered if failure.kind == "timeout"]
    if timeouts and unresponsive:
        ranks = ", ".join(map(str, unresponsive))
        error = f"no response for {timeout:g} s (trainer.timeout); unresponsive ranks: {ranks}"
        return RankFailure(unresponsive[0], "timeout", error, timeouts[0].trace)
    if unresponsive:
        return RankFailure(unresponsive[0], "died", NO_REPORT, ordered[0].trace)
    return (timeouts or ordered)[0]


def record_rank_failure(folder: Path, failure: RankFailure) -> None:
    """Write status, rank and error to `status.json`, whatever rank 0 has written before."""
    path = folder / "status.json"
    content = read_status(folder)
    status = {"stopped": "preempted", "interrupted": "interrupted"}.get(failure.kind, "failed")
    if failure.kind == "stopped":
        status = TrainingInterrupted(StopReason(failure.reason)).status
    now = datetime.now(UTC).isoformat(timespec="seconds")
    error = f"rank {failure.rank}: {failure.error}" if status == "failed" else None
    rank = failure.rank if status == "failed" else None
    content |= {"status": status, "updated": now, "error": error, "rank": rank}
    try:
        write_json(path, content)
    except StorageError as storage_error:  # must not hide the failure itself
        if failure.exit_code != StorageError.exit_code:
            log.error("%s", storage_error)
