"""Open `app/` and the architecture is visible: imports run one way, down the floors."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

APP = Path(__file__).parents[1] / "app"

# From the top down; a module may import those of its own floor and of floors below it.
FLOORS = [
    ["app.__main__", "app.cli.main", "app.experiment.notebook", "app.cli.report"],
    ["app.cli.preflight"],
    ["app.sweep"],
    ["app.experiment.job"],
    ["app.distributed.launch"],
    ["app.experiment.run"],
    ["app.experiment.tuner"],
    ["app.experiment.factory"],
    ["app.experiment.factory"],
    ["app.experiment.dry_run", "app.data.datamodule", "app.experiment.tuner"],
    ["app.training.trainer"],
    ["app.training.nonfinite", "app.training.checkpoint.policy"],
    ["app.training.nonfinite_trace"],
    ["app.experiment.status", "app.callbacks"],
    [
        "app.training.checkpoint.train_state",
        "app.training.dcgan_task",
        "app.training.checkpoint.mid_epoch",
    ],
    ["app.training.task", "app.training.rank_sync"],
    ["app.training.optim.optim_wrapper", "app.training.checkpoint.checkpoint", "app.training.oom"],
    [
        "app.training.checkpoint.content_check",
        "app.training.checkpoint.archive_reader",
        "app.training.checkpoint.pickle_reader",
        "app.training.checkpoint.tensor_reader",
    ],
    [
        "app.training.optim.optim_wrapper",
        "app.training.optim.weight_averaging",
        "app.training.optim.freezing",
        "app.callbacks.prediction_files",
        "app.experiment.export",
    ],
    [
        "app.training.optim.lr_schedule",
        "app.training.accumulator",
        "app.distributed.strategies",
        "app.training.pruning",
        "app.training.optim.finite_check",
    ],
    ["app.distributed.sync_batchnorm"],
    ["app.data", "app.models", "app.losses", "app.metrics", "app.training.optim.chain"],
    [
        "app.runtime.device",
        "app.distributed.collectives",
        "app.runtime.seed",
        "app.training.history",
        "app.runtime.nested",
        "app.training.plan",
        "app.training.nonfinite",
        "app.runtime.figures",
    ],
    ["app.training.checkpoint.rotation"],
    ["app.training.checkpoint.checksum", "app.runtime.background_writer", "app.runtime.lock"],
    ["app.runtime.files", "app.runtime.signals"],
    ["app.runtime.fault_injection"],
    ["app.config"],
    ["app"],
]


def modules() -> dict[str, Path]:
    return {
        ".".join(("app", *path.relative_to(APP).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): path
        for path in APP.rglob("*.py")
    }


def floor_of(module: str) -> int:
    fits = [
        (len(prefix), number)
        for number, floor in enumerate(FLOORS)
        for prefix in floor
        if module == prefix or module.startswith(f"{prefix}.")
    ]
    return max(fits)[1]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""}
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & modules().keys()


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_downwards(module: str) -> None:
    upwards = {
        other
        for other in imports(modules()[module])
        if other != "app" and floor_of(other) < floor_of(module)
    }
    assert not upwards, f"{module} imports {upwards} from above"


def test_models_import_nothing_of_the_program() -> None:
    for module, path in modules().items():
        if module.startswith("app.models."):
            assert not imports(path), module


def test_parts_folders_do_not_import_one_another_in_circles() -> None:
    for module, path in modules().items():
        if module.startswith(("app.losses", "app.metrics")):
            assert not any(name.startswith("app.data") for name in imports(path)), module


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "module", ["app", "app.cli.main", "app.distributed.launch.select", "app.config.validate"]
)
def test_top_and_bottom_floor_do_not_import_torch(module: str) -> None:
    assert python(f"import sys, {module}; print('torch' in sys.modules)").strip() == "False"


@pytest.mark.parametrize(
    "words", [["--help"], ["--cfg", "job"], ["--hydra-help"], ["--info", "searchpath"]]
)
def test_what_only_shows_does_not_import_torch(words: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["app", *{words!r}]
from app.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("torch" in sys.modules)
"""
    assert python(code).splitlines()[-1] == "False"
