"""Call every allowed target with hostile arguments, and print what reaches outside the program.

Run as `python -m tests.support.walk_targets [WORD ...]` in an empty folder. With words, only
modules whose names contain one of them are walked.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from app.config.allowlist import (
    LIBRARY_MODULES,
    OWN_PACKAGES,
    Target,
    TargetError,
    allowed_targets,
    signature_parameters,
)

MARK = "hostile_mark"
HOSTILE = (
    f"{Path.cwd()}/{MARK}.pt",
    f"__import__('os').system('touch {MARK}')",
    f'"+str(open("{MARK}","w"))+f"{{open("{MARK}")}}',
    f"http://127.0.0.1:9/{MARK}.pth",
    f"{MARK}.evil",
)
STARTS_PROGRAM = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork")
RUNS_CODE = ("compile", "exec", "import", "ctypes.", "pickle.")
REACHES_OUTSIDE = (*STARTS_PROGRAM, "socket.", "urllib.", "pickle.")
# Files, folders and servers that a configuration may name; see SECURITY.md.
OPENS_BY_DESIGN = ("app.data.", "app.callbacks.", "app.metrics.images.", "torchvision.datasets.")
HARMLESS = ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv")


class Recorder:
    """Audit hook that records the events of a call which name its arguments or reach outside."""

    def __init__(self) -> None:
        self.target = ""
        self.found: dict[str, str] = {}

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.target or event in HARMLESS:
            return
        is_marked = any(MARK in str(argument) for argument in arguments)
        opens_by_design = self.target.startswith(OPENS_BY_DESIGN)
        if event == "open":
            mode, flags = str(arguments[1]), int(arguments[2] or 0)
            is_written = any(c in mode for c in "wax+") or flags & (os.O_WRONLY | os.O_RDWR)
            is_written = is_written and "__pycache__" not in str(arguments[0])
            is_harmful = not opens_by_design and (is_marked or is_written)
        elif opens_by_design:
            is_harmful = is_marked and event.startswith((*STARTS_PROGRAM, *RUNS_CODE))
        else:
            is_harmful = is_marked or event.startswith(REACHES_OUTSIDE)
        if is_harmful:
            target, self.target = self.target, ""
            self.found.setdefault(target, f"{event} {str(arguments)[:200]}")
            self.target = target


def modules(words: list[str]) -> Iterator[str]:
    """Yield the modules whose components a configuration may name."""
    own = [
        f"{package}.{module.name}"
        for package in OWN_PACKAGES
        for module in pkgutil.iter_modules(pkgutil.resolve_name(package).__path__)
    ]
    for module in (*LIBRARY_MODULES, *own):
        if not words or any(word in module for word in words):
            yield module


def calls(target: Target) -> Iterator[dict[str, Any]]:
    """Yield arguments: each parameter in turn is hostile, the other required ones are small."""
    parameters = signature_parameters(target)
    required = {
        name: "relu" if "str" in str(parameter.annotation) else 2
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    for number, name in enumerate(parameters):
        text = HOSTILE[number % len(HOSTILE)]
        kind = parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            yield required | {MARK: text, "norm_layer": text}
        elif kind is not inspect.Parameter.VAR_POSITIONAL:
            yield required | {name: text}
    if required:
        yield from (dict.fromkeys(required, text) for text in HOSTILE)
        yield {name: {HOSTILE[2]: torch.nn.ReLU()} for name in required}


def walk(module: str, recorder: Recorder) -> int:
    """Call each component of a module; return how many it has."""
    targets = allowed_targets(module)
    for name, target in targets.items():
        for arguments in calls(target):
            recorder.target = f"{module}.{name}"
            with contextlib.suppress(Exception), torch.device("meta"):
                if module.startswith("torchvision.models"):
                    arguments = {"weights": None, "weights_backbone": None} | arguments
                target(**arguments)
            recorder.target = ""
    return len(targets)


def main(words: list[str]) -> None:
    warnings.simplefilter("ignore")
    recorder = Recorder()
    sys.addaudithook(recorder)
    counts: dict[str, int] = {}
    for module in modules(words):
        with contextlib.suppress(TargetError):  # a library that is not installed
            counts[module] = walk(module, recorder)
    sys.stdout.write(json.dumps({"counts": counts, "found": recorder.found}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
