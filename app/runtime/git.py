"""Say which commit a folder is at, and what has changed since, without running foreign code.

A repository may belong to someone else, and its configuration may name programs that git runs. None
of them is: no hooks, file system monitors, external diffs, text conversions or filters of the
repository itself, and nothing is fetched. Filters that the user has configured globally, such as
that of git-lfs, are used.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer

TIME_LIMIT = 3.0  # seconds for all git commands of a repository
MAX_OUTPUT_BYTES = 2**20
MAX_UNTRACKED = 100  # names of untracked files that are listed
SAFE_OPTIONS = (
    "--no-pager",
    *("-c", "core.fsmonitor=false"),
    *("-c", f"core.hooksPath={os.devnull}"),
    *("-c", "safe.bareRepository=explicit"),
)
SAFE_ENVIRONMENT = {
    "GIT_OPTIONAL_LOCKS": "0",  # do not write the index
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_ALLOW_PROTOCOL": "",
    "GIT_TERMINAL_PROMPT": "0",
    "LC_ALL": "C",
}
USER_CONFIG = ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM")
TRUSTED = ("system", "global", "command")  # scopes of configuration that is the user's own
FILTERS_OFF = ("clean=", "smudge=", "process=", "required=false")
DIFF_OPTIONS = (
    *("--no-ext-diff", "--no-textconv", "--no-color", "--ignore-submodules=dirty"),
    *("--submodule=short", "--src-prefix=a/", "--dst-prefix=b/", "--no-relative"),
)


class GitError(Exception):
    """Git cannot say what was asked; the message says why."""


@dataclass(frozen=True)
class Repository:
    """The state of a git repository.

    Attributes:
        folder: Top folder of the working tree.
        commit: Hash of the commit that is checked out; None before the first commit.
        branch: Name of the branch; None if no branch is checked out.
        is_dirty: Whether tracked files differ from the commit.
        untracked: Files and folders that are neither tracked nor ignored, the first 100.
        diff: Difference of the tracked files from the commit, the first MiB.
        is_diff_cut: Whether the difference is longer.
    """

    folder: Path
    commit: str | None
    branch: str | None
    is_dirty: bool
    untracked: list[str] = field(default_factory=list)
    diff: bytes = b""
    is_diff_cut: bool = False


def read_repository(folder: Path) -> Repository:
    """Return the state of the repository that contains a folder.

    Raises:
        GitError: There is no repository, no git, or git did not answer in time.
    """
    top = find_top(folder)
    git = _Git(top)
    # A repository can claim any other folder, whose files would get into the difference.
    if Path(os.fsdecode(git.run("rev-parse", "--show-toplevel").removesuffix(b"\n"))) != top:
        raise GitError(f"the working tree of the repository in {top} is another folder")
    git.options += git.filter_options()
    # The first lines are the branch; with -z, lines end in NUL, and names are not quoted.
    text = os.fsdecode(
        git.run(
            *("status", "--porcelain=v2", "--branch", "-z", "--no-renames"),
            *("--untracked-files=normal", "--ignore-submodules=dirty"),
        )
    )
    lines = text.split("\0")[:-1]
    header = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# "))
    commit, branch = header.get("branch.oid"), header.get("branch.head")
    commit = None if commit == "(initial)" else commit
    untracked = [line[2:] for line in lines if line.startswith("? ")]
    is_dirty = any(line.startswith(("1 ", "2 ", "u ")) for line in lines)
    diff = b"" if commit is None or not is_dirty else git.run("diff", *DIFF_OPTIONS, "HEAD", "--")
    return Repository(
        top,
        commit,
        None if branch == "(detached)" else branch,
        is_dirty,
        untracked[:MAX_UNTRACKED],
        diff[:MAX_OUTPUT_BYTES],
        len(diff) > MAX_OUTPUT_BYTES,
    )


def find_top(folder: Path) -> Path:
    """Return the folder of the repository that contains a folder.

    Raises:
        GitError: There is no repository.
    """
    folder = folder.resolve()
    for parent in (folder, *folder.parents):
        if (parent / ".git").exists():
            return parent
    raise GitError("not in a git repository")


class _Git:
    """Runs git in a folder, with a time limit for all commands together."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.options = folder, [*SAFE_OPTIONS]
        self.deadline = time.monotonic() + TIME_LIMIT

    def run(self, *arguments: str, allowed_codes: Sequence[int] = (0,)) -> bytes:
        """Return the output of a command, cut off one byte after the limit.

        Raises:
            GitError: It failed or took too long.
        """
        try:
            process = subprocess.Popen(
                ["git", *self.options, *arguments],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,
            )
        except OSError as error:
            raise GitError("git is not installed") from error
        timer = Timer(max(0.0, self.deadline - time.monotonic()), _kill, [process])
        with process:
            timer.start()
            assert process.stdout is not None
            output = process.stdout.read(MAX_OUTPUT_BYTES + 1)
            is_cut = len(output) > MAX_OUTPUT_BYTES
            if is_cut:
                _kill(process)
            process.wait()
            timer.cancel()
        if time.monotonic() >= self.deadline:
            raise GitError(f"git did not answer within {TIME_LIMIT:g} s")
        if not is_cut and process.returncode not in allowed_codes:
            code = process.returncode
            raise GitError(f"git {arguments[0]} failed with exit code {code} in {self.folder}")
        return output

    def filter_options(self) -> list[str]:
        """Return options that switch off the filters that the repository itself configures."""
        listed = self.run(
            *("config", "--includes", "--null", "--show-scope", "--name-only"),
            *("--get-regexp", r"^filter\."),
            allowed_codes=(0, 1),  # 1: there are none
        )
        fields = os.fsdecode(listed).split("\0")[:-1]
        scopes_and_keys = zip(fields[::2], fields[1::2], strict=True)
        names = {key.rpartition(".")[0] for scope, key in scopes_and_keys if scope not in TRUSTED}
        if any("=" in name for name in names):  # where git ends the name of an option
            raise GitError("the repository configures a filter with = in its name")
        values = (f"{name}.{kind}" for name in sorted(names) for kind in FILTERS_OFF)
        return [part for value in values for part in ("-c", value)]


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill git and the programs that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _environment() -> dict[str, str]:
    """Return the environment without variables that name another repository than the folder's."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith("GIT_") or n in USER_CONFIG}
    return kept | SAFE_ENVIRONMENT
