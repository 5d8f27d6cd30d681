"""The state of a git repository, also of one that tries to run programs or to leak files."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from app.runtime import git
from app.runtime.git import GitError, read_repository


def run_git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one commit of one file."""
    folder = tmp_path / "repository"
    folder.mkdir()
    run_git(folder, "init")
    (folder / "model.py").write_text("width = 1\n")
    run_git(folder, "add", "model.py")
    run_git(folder, "commit", "-m", "first")
    return folder


def test_read_repository_clean_has_commit_and_branch(repository: Path) -> None:
    (repository / "part").mkdir()
    found = read_repository(repository / "part")
    assert found.folder == repository
    assert found.commit is not None
    assert len(found.commit) == 40
    assert (found.branch, found.is_dirty, found.untracked, found.diff) == ("main", False, [], b"")


def test_read_repository_changes_are_a_patch_that_applies(repository: Path) -> None:
    (repository / "model.py").write_text("width = 2\n")
    (repository / "new\n.py").touch()
    found = read_repository(repository)
    assert found.is_dirty
    assert found.untracked == ["new\n.py"]
    run_git(repository, "checkout", "model.py")
    (repository / "a.patch").write_bytes(found.diff)
    run_git(repository, "apply", "a.patch")
    assert (repository / "model.py").read_text() == "width = 2\n"


def test_read_repository_long_diff_is_cut(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(git, "MAX_OUTPUT_BYTES", 2000)
    (repository / "model.py").write_text("x\n" * 10_000)
    found = read_repository(repository)
    assert (len(found.diff), found.is_diff_cut) == (2000, True)


def test_read_repository_without_commit_or_branch(repository: Path, tmp_path: Path) -> None:
    run_git(repository, "checkout", "--detach")
    assert read_repository(repository).branch is None
    empty = tmp_path / "empty"
    empty.mkdir()
    run_git(empty, "init")
    assert read_repository(empty).commit is None


def test_read_repository_other_variables_of_git_do_not_matter(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other"))
    assert read_repository(repository).branch == "main"


def test_read_repository_without_repository_or_git_says_so(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GitError, match="not in a git repository"):
        read_repository(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GitError, match="git is not installed"):
        read_repository(repository)


def test_read_repository_slow_git_is_killed(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "git"
    program.write_text("#!/bin/sh\n/bin/sleep 60 &\nwait\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(git, "TIME_LIMIT", 0.1)
    start = time.monotonic()
    with pytest.raises(GitError, match="did not answer within"):
        read_repository(repository)
    assert time.monotonic() - start < 30, "the child of git keeps its output open"


@pytest.mark.parametrize(
    "setting",
    [
        "core.fsmonitor",
        "diff.external",
        "diff.evil.command",
        "diff.evil.textconv",
        "filter.evil.clean",
        "filter.evil.process",
        "filter.e=vil.clean",
        "core.pager",
    ],
)
def test_read_repository_runs_no_program_of_the_repository(
    repository: Path, tmp_path: Path, setting: str
) -> None:
    trace, program = tmp_path / "trace", tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho run >> '{trace}'\ncat\n")
    program.chmod(0o755)
    (repository / ".gitattributes").write_text("*.py filter=evil diff=evil\n")
    run_git(repository, "config", setting, str(program))
    (repository / "model.py").write_text("width = 2\n")
    try:
        assert b"width = 2" in read_repository(repository).diff
    except GitError as error:
        assert "= in its name" in str(error)
    assert not trace.exists()


def test_read_repository_runs_no_hook(repository: Path, tmp_path: Path) -> None:
    hook = repository / ".git" / "hooks" / "post-index-change"
    hook.write_text(f"#!/bin/sh\ntouch '{tmp_path}/trace'\n")
    hook.chmod(0o755)
    (repository / "model.py").touch()
    read_repository(repository)
    assert not (tmp_path / "trace").exists()


def test_read_repository_that_claims_another_folder_is_refused(
    repository: Path, tmp_path: Path
) -> None:
    run_git(repository, "config", "core.worktree", str(tmp_path))
    with pytest.raises(GitError, match="is another folder"):
        read_repository(repository)
