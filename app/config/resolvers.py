"""The functions that YAML files may use in `${...}`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf


def register() -> None:
    """Makes them known to OmegaConf; may be called again."""
    OmegaConf.register_new_resolver("or", _first_given, replace=True)
    OmegaConf.register_new_resolver("path", _path, replace=True)
    OmegaConf.register_new_resolver("image_part", _image_part, replace=True)
    OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)


def _first_given(*values: object) -> object:
    return next((value for value in values if value is not None), None)


def _path(text: str) -> str:
    """Absolute, against the folder in which the command was typed."""
    return str(Path(text).expanduser().absolute())


def _image_part(shape: Sequence[int], index: int) -> int | None:
    """The channels (0) or the height (1) of an image's shape; None where it is no image."""
    return shape[index] if len(shape) == 3 else None


def _run_name(mode: str, ckpt: object, model: str, data: str) -> str:
    """`alexnet_mnist`, or `test_alexnet_mnist` after the run whose checkpoint is tested."""
    if not isinstance(ckpt, str):  # where it is given, it is refused
        return f"{model}_{data}"
    path = Path(ckpt)
    folder = path.parent.parent if path.parent.name == "checkpoints" else path
    return f"{mode}_{folder.stem.partition('_')[2] or folder.stem}"


def _run_folder(resume: object, fresh: str) -> str:
    """That of the run which is to go on, or whose checkpoint that is; else a new one."""
    if not isinstance(resume, str) or resume in ("", "auto"):  # what is no path is refused
        return fresh
    path = Path(_path(resume))
    return str(path.parent.parent if path.suffix == ".pt" else path)
