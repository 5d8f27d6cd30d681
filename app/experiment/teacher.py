"""The teacher of `task=distill`: a trained run, of which only the model and weights are used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.config.allowlist import ALLOWED, TARGET, is_allowed, trust_hint
from app.config.instantiate import iter_node_issues
from app.config.nested import dotted, get_at, iter_leaves, shorten
from app.config.resolve import PlainConfig
from app.config.saved import check_saved, resolve_saved
from app.config.secrets import referenced_secrets
from app.config.types import MISSING, UNKNOWN
from app.runtime.errors import ConfigIssue, UserError, as_user_error
from app.training.checkpoint.rotation import find_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

KEY = "teacher"
ALLOWED_FILES = "the folder or a checkpoint of a training"


@dataclass(frozen=True)
class Teacher:
    """What is used of a trained run.

    Attributes:
        file: The checkpoint.
        sha256: Hash of the checkpoint.
        config: Resolved configuration of the run; it may come from someone else.
        weights: Tensors of the model by name, on the CPU.
    """

    file: Path
    sha256: str
    config: PlainConfig
    weights: dict[str, Tensor]

    @property
    def model(self) -> Any:
        """The node of the model."""
        return self.config.get("model")

    @property
    def record(self) -> dict[str, str]:
        """What identifies the teacher, for `environment.json`."""
        return {"checkpoint": str(self.file), "sha256": self.sha256}


def read_teacher(path: Path) -> Teacher:
    """Read the checkpoint of a trained run, without executing anything in it.

    Args:
        path: A run folder, whose best checkpoint is meant, or a checkpoint.

    Raises:
        UserError: It does not exist, is damaged, or is none of a training with a configuration.
    """
    from app.training.checkpoint.checkpoint import load_checkpoint

    with as_user_error(KEY):
        if not path.exists():
            raise UserError(
                f"{KEY}={str(path)!r} does not exist; allowed: {ALLOWED_FILES}. A training with a "
                "teacher reads it whenever it is started, also to resume"
            )
        file = find_checkpoint(path, KEY)
        try:
            checkpoint = load_checkpoint(file)
        except UserError as error:
            raise UserError(f"{KEY}: {error}; allowed: {ALLOWED_FILES}") from error
        with file.open("rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    if checkpoint.config is None:
        raise UserError(
            f"{KEY}={str(path)!r} was saved by a Trainer from Python and has no configuration, "
            f"which names the model; allowed: {ALLOWED_FILES}"
        )
    check_saved(checkpoint.config, f"{KEY}: {file}")
    return Teacher(file, sha256, resolve_saved(checkpoint.config), checkpoint.model)


def config_issues(teacher: Teacher, trusted: Sequence[str]) -> list[ConfigIssue]:
    """Return what is wrong with the configuration of a teacher.

    All targets in it must be allowed, although only the model is built. None that is not allowed
    is imported.

    Args:
        teacher: May come from someone else.
        trusted: Modules that the user trusts by name.
    """
    refused = {
        dotted(path): name
        for path, name in iter_leaves(teacher.config)
        if path and path[-1] == TARGET and not is_allowed(name, trusted)
    }
    if refused:
        return [
            *(
                ConfigIssue(f"{KEY}: {key}", f"={name!r} is not allowed; allowed: {ALLOWED}")
                for key, name in refused.items()
            ),
            ConfigIssue("", trust_hint(map(str, refused.values()))),
        ]
    model = teacher.model
    if not isinstance(model, dict) or TARGET not in model:
        return [ConfigIssue(f"{KEY}: ", f"{teacher.file} has no model: {shorten(model)}")]
    secrets = [
        ConfigIssue(f"{KEY}: model.{dotted(path)}", f"={text!r} reads a secret; allowed: none")
        for path, text in iter_leaves(model)
        if referenced_secrets(text)
    ]
    return [*secrets, *iter_node_issues(f"{KEY}: model", model, trusted)]


def mismatch_issues(teacher: Teacher, plain: PlainConfig) -> Iterator[ConfigIssue]:
    """Yield why outputs of a teacher do not fit the data of a training.

    Args:
        teacher: A trained run.
        plain: Resolved configuration of the training.
    """
    source = f"={str(teacher.file)!r}"
    known = ("num_classes", "class_names", "normalize")
    ours, theirs = ({n: get_at(c, ("data", n)) for n in known} for c in (plain, teacher.config))
    if any(value in (MISSING, UNKNOWN) for value in ours.values()):
        return  # which is reported itself
    if not isinstance(ours["num_classes"], int):
        problem = f"{source} needs classes, whose logits are compared; data.num_classes is null"
        yield ConfigIssue(KEY, problem)
    elif ours["num_classes"] != theirs["num_classes"]:
        count = f"{theirs['num_classes']} classes; here data.num_classes={ours['num_classes']}"
        yield ConfigIssue(KEY, f"{source} was trained with {count}; they must be the same")
    else:
        yield from _name_issues(source, theirs["class_names"], ours["class_names"])
    if ours["normalize"] != theirs["normalize"]:
        problem = (
            f"{source} was trained with data.normalize={shorten(theirs['normalize'])}; here it is "
            f"{shorten(ours['normalize'])}, but both get the same inputs: set that of the teacher"
        )
        yield ConfigIssue(KEY, problem)


def _name_issues(source: str, theirs: Any, ours: Any) -> Iterator[ConfigIssue]:
    """Compare as many names of classes, where both are known."""
    if not (isinstance(theirs, list) and isinstance(ours, list)):
        return
    for number, (name, own) in enumerate(zip(theirs, ours, strict=False)):
        if name != own:
            problem = f"{source} was trained with {name!r} as class {number}; here it is {own!r}"
            yield ConfigIssue(KEY, f"{problem}; names and order must be the same")
            return
