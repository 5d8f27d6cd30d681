"""`environment.json`: what made a run, so that it can be explained and repeated later.

The file has a record for each attempt: a run that is resumed appends its own, because the code, the
packages or the machine may be others by then.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import torch

from app.config.nested import get_at, get_child, iter_children
from app.config.schema import Job
from app.config.secrets import SECRET_REFERENCE, looks_secret, redact_text
from app.data.identity import DataIdentity
from app.distributed.collectives import world_size
from app.runtime.device import describe_device
from app.runtime.errors import UserError
from app.runtime.files import atomic_write, write_json
from app.runtime.git import GitError, Repository, find_top, read_repository
from app.runtime.packages import installed_packages
from app.runtime.small_files import describe_special_file, read_json

log = logging.getLogger(__name__)
ENVIRONMENT_FILE = "environment.json"
PATCH_NAME = "uncommitted"
MAX_ATTEMPTS = 100  # that are kept: the first one, and the newest
LIBRARIES = ("torch", "torchvision", "torchmetrics", "hydra-core", "omegaconf", "numpy", "pandas")
STATUS_FIELDS = ("folder", "commit", "branch", "is_dirty", "note")  # of the code, in `status.json`
PROGRAM_FOLDER = Path(__file__).parents[2]
NVIDIA_VERSION_FILE = Path("/proc/driver/nvidia/version")


class Environment:
    """The code, packages and machine that run a job now.

    Args:
        job: The job, for its mode and command.
        device: The device of this rank.

    Attributes:
        repositories: State of the repositories of the working directory and, if it is a checkout,
            of this program; or why there is none.
        content: The record, without the code and the data.
    """

    def __init__(self, job: Job, device: torch.device) -> None:
        self.repositories = find_repositories()
        self.content = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "mode": job.config.mode,
            "command": shlex.join(map(redact_argument, sys.argv)),
            "overrides": [*map(redact_argument, job.overrides)],
            "working_folder": str(Path.cwd()),
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "cpu": describe_cpu(),
            "device": describe_device(device),
            **describe_gpus(device),
            "ranks": world_size(),
            **describe_packages(),
        }

    @property
    def status_fields(self) -> dict[str, Any]:
        """The part that is repeated in `status.json`."""
        code = {
            role: {name: value for name, value in entry.items() if name in STATUS_FIELDS}
            for role, entry in describe_repositories(self.repositories).items()
        }
        names = ("command", "host")
        return {n: self.content[n] for n in names} | {"code": code, "versions": self.versions}

    @property
    def versions(self) -> dict[str, str]:
        """The versions of Python, the platform and the main libraries."""
        packages = self.content["packages"]
        return {
            **{name: self.content[name] for name in ("python", "platform")},
            **{name: packages[name] for name in LIBRARIES if name in packages},
        }

    def write(
        self,
        folder: Path,
        source: Mapping[str, Any],
        data: Mapping[str, DataIdentity],
        initial_weights: Mapping[str, Any] | None = None,
        teacher: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Append the record to `environment.json`, and save uncommitted changes as a patch.

        Args:
            folder: The run folder.
            source: The data source of each stage, from the resolved configuration.
            data: Which data each stage has.
            initial_weights: Which file the initial weights are from; None if they are from none.
            teacher: Which checkpoint the run learns from; None if it learns from none.

        Returns:
            The record.

        Raises:
            StorageError: A file cannot be written.
        """
        code = describe_repositories(self.repositories)
        for role, found in self.repositories.items():
            if isinstance(found, Repository) and found.diff:
                code[role]["patch"] = _write_patch(folder, _patch_of(found))
        stages = {stage: asdict(identity) for stage, identity in data.items()}
        record = {
            **self.content,
            "code": code,
            "data": {"source": source, "stages": stages},
            "initial_weights": initial_weights,
            "teacher": teacher,
        }
        earlier = read_attempts(folder)
        if teacher and earlier and earlier[-1].get("teacher") not in (None, teacher):
            log.warning(
                "teacher: %s has changed since the run was started; the rest of the run learns "
                "from other weights",
                teacher["checkpoint"],
            )
        attempts = [*earlier, record]
        kept = [*attempts[:1], *attempts[1:][-(MAX_ATTEMPTS - 1) :]]
        write_json(folder / ENVIRONMENT_FILE, {"attempts": kept})
        return record


def code_record() -> dict[str, Any]:
    """Return the part of a record that is known before a run starts."""
    return {**describe_packages(), "code": describe_repositories(find_repositories())}


def describe_packages() -> dict[str, Any]:
    """Return the version of Python and of all installed packages."""
    return {"python": platform.python_version(), "packages": installed_packages()}


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run folder, oldest first; log a warning if they are damaged."""
    try:
        attempts = read_json(folder, ENVIRONMENT_FILE).get("attempts", [])
        if isinstance(attempts, list) and all(isinstance(record, dict) for record in attempts):
            return attempts
        problem: object = f"{folder / ENVIRONMENT_FILE} is damaged: attempts is no list of objects"
    except UserError as error:
        problem = error
    log.warning("%s; the environments of earlier attempts are unknown", problem)
    return []


def redact_argument(argument: str) -> str:
    """Return an argument of the command line without secrets.

    Values of environment variables that look secret are replaced, and so are values of keys that
    do, except references to environment variables.
    """
    key, equals, value = argument.partition("=")
    if equals and value and looks_secret(key) and not SECRET_REFERENCE.search(value):
        return f"{key}=<redacted>"
    return redact_text(argument)


def find_repositories() -> dict[str, Repository | str]:
    """Return the repositories of the working directory and of this program, or why not."""
    folders = {"working_folder": Path.cwd()}
    if (PROGRAM_FOLDER / "pyproject.toml").exists():  # an installed package has none
        folders["program"] = PROGRAM_FOLDER
    found: dict[str, Repository | str] = {}
    for role, folder in folders.items():
        try:
            top = find_top(folder)
            same = [r for r in found.values() if isinstance(r, Repository) and r.folder == top]
            found[role] = same[0] if same else read_repository(folder)
        except GitError as error:
            found[role] = str(error)
    return found


def describe_repositories(
    repositories: Mapping[str, Repository | str],
) -> dict[str, dict[str, Any]]:
    """Return the code of a record."""
    return {role: _describe_repository(found) for role, found in repositories.items()}


def _describe_repository(found: Repository | str) -> dict[str, Any]:
    if isinstance(found, str):
        return {"commit": None, "note": found}
    content = _patch_of(found)
    patch_hash = hashlib.sha256(content).hexdigest() if content else None
    return {
        "folder": str(found.folder),
        "commit": found.commit,
        "branch": found.branch,
        "is_dirty": found.is_dirty,
        "untracked": found.untracked,
        "patch": None,
        "patch_sha256": patch_hash,
        "is_patch_cut": found.is_diff_cut,
    }


def _patch_of(repository: Repository) -> bytes:
    """Return the uncommitted changes without the values of secret variables."""
    text = repository.diff.decode(errors="surrogateescape")
    return redact_text(text).encode(errors="surrogateescape")


def _write_patch(folder: Path, content: bytes) -> str:
    """Save a patch in a file that no attempt with another one uses, and return its name."""
    for number in count(1):
        path = folder / (f"{PATCH_NAME}.patch" if number == 1 else f"{PATCH_NAME}-{number}.patch")
        if not os.path.lexists(path):
            atomic_write(path, lambda file: file.write(content))
            break
        if _has_content(path, content):
            break
    return path.name


def _has_content(path: Path, content: bytes) -> bool:
    is_regular = describe_special_file(path) is None
    return is_regular and path.stat().st_size == len(content) and path.read_bytes() == content


def describe_cpu() -> dict[str, int | None]:
    """Return the number of cores and threads, and the memory of this machine."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return {
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }


def describe_gpus(device: torch.device) -> dict[str, Any]:
    """Return the CUDA devices that this process sees, and the versions of what drives them.

    Nothing is asked of CUDA unless the run uses it, because that takes seconds.
    """
    if device.type != "cuda":
        return {"gpus": [], "driver": None, "cuda": None, "cudnn": None}
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    gpus = [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in properties]
    cudnn = torch.backends.cudnn.version()
    return {"gpus": gpus, "driver": _driver_version(), "cuda": torch.version.cuda, "cudnn": cudnn}


def _driver_version() -> str | None:
    """Return the version of NVIDIA's driver, from its file on Linux."""
    try:
        text = NVIDIA_VERSION_FILE.read_text()
    except OSError:
        return None
    match = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)
    return match[1] if match else None


def describe_code(record: Mapping[str, Any]) -> str:
    """Return the code of a record as text for the log."""
    entries = {
        entry.get("folder", role.replace("_", " ")): entry for role, entry in record["code"].items()
    }
    return "; ".join(f"{where}: {_describe_entry(entry)}" for where, entry in entries.items())


def _describe_entry(entry: Mapping[str, Any]) -> str:
    if entry["commit"] is None:
        return str(entry.get("note", "no commit yet"))
    branch = entry["branch"]
    parts = [
        f"commit {entry['commit'][:10]} ({f'branch {branch}' if branch else 'no branch'})",
        f"uncommitted changes in {entry['patch']}" if entry["patch"] else "",
        f"{len(entry['untracked'])} untracked" if entry["untracked"] else "",
    ]
    return ", ".join(filter(None, parts))


def iter_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each part of two records that may make their results differ.

    What is missing in one of them is not compared.
    """
    old, new = _flatten(before), _flatten(after)
    for name in new:
        values = (old.get(name), new[name])
        if None not in values and values[0] != values[1]:
            yield f"{name}: {values[0]} before, {values[1]} now"


def _flatten(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a record that may change its results, by what they are called."""
    device = record.get("device")
    flat = {
        "device": device and re.sub(r" \(\d+ threads\)$", "", str(device)),
        "number of threads": get_at(record, ("cpu", "threads")),
        "number of ranks": record.get("ranks"),
        "python": record.get("python"),
    }
    for role, entry in iter_children(record.get("code")):
        where = str(role).replace("_", " ")
        flat[f"commit of the {where}"] = commit = get_child(entry, "commit")
        changes = get_child(entry, "patch_sha256") or "none"
        flat[f"uncommitted changes of the {where}"] = None if commit is None else changes
    for name, version in iter_children(record.get("packages")):
        flat[f"package {name}"] = version
    for stage, identity in iter_children(get_at(record, ("data", "stages"))):
        flat[f"number of {stage} samples"] = get_child(identity, "samples")
        flat[f"hash of the {stage} data"] = get_child(identity, "hash")
    flat["hash of the initial weights"] = get_at(record, ("initial_weights", "sha256"))
    return flat
