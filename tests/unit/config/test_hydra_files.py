"""Where Hydra would write, after everything has been resolved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from app.config import resolvers
from app.config.compose import open_composer
from app.config.hydra_files import pin_hydra_paths
from app.config.hydra_guard import hydra_issues
from app.config.limits import limited_interpolations
from app.config.overrides import parse_overrides

FILENAME = "hydra.job_logging.handlers.file.filename"
OUTSIDE = "is not a .log file in the run folder"


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    resolvers.register()
    with open_composer(get_args_parser().parse_args(["model=mlp"])) as composer:
        return composer.base


def changed(composed: DictConfig, values: dict[str, Any]) -> DictConfig:
    config = copy.deepcopy(composed)
    with read_write(config), open_dict(config), read_write(config.hydra):
        for key, value in values.items():
            OmegaConf.update(config, key, value, force_add=True)
    return config


def problems(config: DictConfig, *typed: str) -> str:
    overrides = parse_overrides(typed)
    with limited_interpolations():
        found = [*hydra_issues(config, [], []), *pin_hydra_paths(config, overrides)]
    return "\n".join(str(issue) for issue in found if issue.key != "hydra.overrides")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({FILENAME: "${hydra.runtime.output_dir}/${notes}", "notes": "../../x"}, OUTSIDE),
        ({FILENAME: "${hydra.runtime.output_dir}${notes}", "notes": "-x"}, OUTSIDE),
        ({FILENAME: "${hydra.run.dir}/${oc.decode:${notes}}", "notes": "'../../x'"}, OUTSIDE),
        ({FILENAME: "${notes}", "notes": "/tmp/x"}, OUTSIDE),
        ({FILENAME: "run.log"}, OUTSIDE),
        ({FILENAME: "${notes}", "notes": "ext://trap.Part", "hydra.run.dir": "ext:"}, OUTSIDE),
        ({FILENAME: "${hydra.run.dir}/linked/x.log", "hydra.run.dir": "here"}, OUTSIDE),
        (
            {
                FILENAME: "${hydra.runtime.output_dir}/${t.${hydra.job.num}}",
                "t": {"0": "a", "1": "../../x"},
            },
            "does not resolve to a path",
        ),
        ({FILENAME: "${hydra.runtime.output_dir}/${nothing}"}, "does not resolve to a path"),
        ({FILENAME: {"a": "${hydra.runtime.output_dir}"}}, "interpolations are not allowed"),
        ({"hydra.job_logging.handlers.file": {".": {"baseFilename": "/x"}}}, "attributes of"),
        ({"hydra.output_subdir": "${notes}", "notes": "../x"}, "not a folder inside the run"),
        ({"hydra.output_subdir": "/x"}, "not a folder inside the run folder"),
        ({"hydra.output_subdir": "linked", "hydra.run.dir": "here"}, "not a folder inside the run"),
        ({"hydra.sweep.subdir": "${hydra.job.num}/${notes}", "notes": "../.."}, "inside the sweep"),
        ({"hydra.job.name": "${notes}", "notes": "../x"}, "hydra.job.name='../x' contains invalid"),
        ({"name": "../../x"}, "_../../x' contains '..'"),
        (
            {
                "hydra.hydra_logging.handlers.file": {
                    "class": "logging.FileHandler",
                    "filename": "${hydra.sweep.dir}/${hydra.job.id}.log",
                }
            },
            "is opened before any job has a number or a folder",
        ),
    ],
)
def test_pin_hydra_paths_outside_is_refused(
    composed: DictConfig, tmp_cwd: Path, values: dict[str, Any], problem: str
) -> None:
    (tmp_cwd / "here").mkdir()
    (tmp_cwd / "here" / "linked").symlink_to(tmp_cwd)
    found = problems(changed(composed, values))
    assert problem in found
    assert len(found.splitlines()) <= 2  # a name may be part of two folders


@pytest.mark.parametrize(
    ("values", "typed"),
    [
        ({FILENAME: "/tmp/x.log"}, f"{FILENAME}=/tmp/x.log"),
        ({"name": "../x"}, "name=../x"),
        ({"hydra.output_subdir": "../x"}, "hydra.output_subdir=../x"),
    ],
)
def test_pin_hydra_paths_typed_is_allowed(
    composed: DictConfig, values: dict[str, Any], typed: str
) -> None:
    assert problems(changed(composed, values), typed) == ""


def test_pin_hydra_paths_keeps_only_references_to_the_job(composed: DictConfig) -> None:
    select = "${oc.select:t.${hydra.job.num},a}"
    values = {FILENAME: f"${{hydra.runtime.output_dir}}/{select}-${{hydra.job.num}}.log"}
    config = changed(composed, values | {"t": {"1": "../../x"}})
    assert problems(config) == ""
    raw = OmegaConf.to_container(config.hydra.job_logging.handlers.file, resolve=False)
    assert isinstance(raw, dict)
    assert raw["filename"] == "${hydra.runtime.output_dir}/a-${hydra.job.num}.log"
