"""OmegaConf resolvers: the functions that YAML files may call in `${...}`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import InterpolationToMissingValueError

from app.runtime.errors import UserError

SECRET_PREFIX = "${oc.env:"  # of what stands for a secret; see `app.config.secrets`

ZOOS_WITH_INPUT = ("app.models.timm_models", "app.models.torchvision_models")
MAX_NAME_BYTES = 200  # of a run; the folder also has the time, and file systems allow 255


def register() -> None:
    """Register the resolvers with OmegaConf. Calling it again has no effect."""
    OmegaConf.register_new_resolver("or", _first_not_none, replace=True)
    OmegaConf.register_new_resolver("path", absolute_path, replace=True)
    OmegaConf.register_new_resolver("image_part", _image_part, replace=True)
    OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
    OmegaConf.register_new_resolver("zoo_input", _zoo_input, replace=True)


@contextmanager
def replaced_resolver(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace a resolver of OmegaConf while the context is open."""
    original = BaseContainer._resolvers[name]
    OmegaConf.register_new_resolver(name, function, replace=True)
    try:
        yield
    finally:
        BaseContainer._resolvers[name] = original


def _first_not_none(*values: object) -> object:
    return next((value for value in values if value is not None), None)


def absolute_path(text: str) -> str:
    """Make a path absolute, except one that a secret variable names."""
    if text.startswith(SECRET_PREFIX):
        return text
    return str(Path(text).expanduser().absolute())


def _image_part(shape: Sequence[int], index: int) -> int | None:
    """Return one entry of an image shape (C, H, W), or None if the shape is not an image's."""
    return shape[index] if len(shape) == 3 else None


def _run_name(mode: str, ckpt: object, model: str, data: str) -> str:
    """Return `alexnet_mnist`, or `test_alexnet_mnist` named after the run of the checkpoint."""
    if not isinstance(ckpt, str):  # None, or a type that is refused later
        return _safe_name(f"{model}_{data}")
    path = Path(ckpt)
    folder = path.parent.parent if path.parent.name == "checkpoints" else path
    return _safe_name(f"{mode}_{folder.stem.partition('_')[2] or folder.stem}")


def _safe_name(text: str) -> str:
    """Replace the characters that the name of a run cannot have, and shorten it."""
    safe = re.sub(r"[^\w.+=,-]+", "-", text)
    return safe.encode()[:MAX_NAME_BYTES].decode(errors="ignore")


def _run_folder(resume: object, new_folder: str) -> str:
    """Return the folder of the run to resume, given as a folder or a checkpoint, or a new one."""
    if not isinstance(resume, str) or resume in ("", "auto"):  # invalid values are refused later
        return new_folder
    path = Path(absolute_path(resume))
    return str(path.parent.parent if path.suffix == ".safetensors" else path)


def _zoo_input(field: str, _root_: Any) -> object:
    """Return what the published weights of the model expect: image_size, eval_crop, mean or std."""
    names = ("_target_", "name", "weights")
    arguments = {name: OmegaConf.select(_root_, f"model.{name}") for name in names}
    name = str(arguments["_target_"]).rpartition(".")[0]
    if name not in ZOOS_WITH_INPUT:
        raise ValueError("zoo_input needs model=timm or model=torchvision")
    module = importlib.import_module(name)
    try:
        module.check_arguments(arguments)
    except UserError as error:  # which is reported once, at the model
        raise InterpolationToMissingValueError(str(error)) from error
    return module.published_input(arguments)[field]


def escape_interpolations(text: str) -> str:
    """Return a text that OmegaConf resolves to the given one."""
    return re.sub(r"(\\*)\$\{", lambda match: f"{match[1] * 2}\\${{", text)
