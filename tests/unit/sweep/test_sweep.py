"""Sweeps without their jobs: names, combinations, mistakes, distributions."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from hydra._internal.utils import get_args_parser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from app.config import resolvers
from app.config.compose import open_composer
from app.config.overrides import grid, parse_overrides, parse_space
from app.config.schema import MonitorConfig
from app.runtime.errors import ConfigError
from app.sweep.job import new_job, short_name, values_hash
from app.sweep.launchers.slots import make_slots, num_ranks
from app.sweep.optuna_search import parse_search_space, to_override
from app.sweep.report.table import Results, aggregate_by_config, best_run, sort_by_goal
from tests.support.sweeps import sweep_errors


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer.lr": "0.1", "model": "lenet"},
        {"data.path": "some/where/else", "name": "'a=b,c d'"},
        {"model.hidden": "[128,64]", "+x": "{a:1,b:'é'}"},
        {"name": "x" * 500},
    ],
)
def test_a_folders_name_can_be_typed_without_quotes(values: dict[str, str]) -> None:
    job = new_job(3, values, [])
    assert re.fullmatch(r"3_[A-Za-z0-9_.-]+_[0-9a-f]{8}", job.folder)
    assert len(job.folder) < 100
    (override,) = parse_overrides([f"ckpt=outputs/sweeps/{job.folder}"])
    assert override.value() == f"outputs/sweeps/{job.folder}"
    assert not override.is_sweep_override()


def test_names_tell_the_values() -> None:
    assert short_name({"optimizer.lr": "0.1", "model": "lenet"}) == "lr-0.1_model-lenet"
    assert short_name({"a.x": "1", "b.x": "2"}) == "a.x-1_b.x-2"
    assert short_name({"optimizer.lr": "0.0012345678901"}) == "lr-0.001235"


def test_the_hash_is_that_of_the_values() -> None:
    assert values_hash({"a": "1", "b": "2"}) == values_hash({"b": "2", "a": "1"})
    assert values_hash({"a": "1"}) != values_hash({"a": "2"})
    assert new_job(0, {"a": "1"}, []).hash == new_job(7, {"a": "1"}, ["other"]).hash


def test_combinations_come_in_hydras_order() -> None:
    space = parse_space(["a=1,2", "model=mlp", "b=x,y"], {})
    rows = grid(space, [])
    assert [(row["a"], row["b"]) for row in rows] == [
        ("1", "x"),
        ("1", "y"),
        ("2", "x"),
        ("2", "y"),
    ]
    assert space.overrides_for(rows[1]) == ["a=1", "model=mlp", "b=y"]
    assert space.fixed == ["model=mlp"]


def test_keys_vary_together() -> None:
    space = parse_space(["a=1,2", "seed=0,1", "b=x,y"], {})
    rows = grid(space, [["a", "b"]])
    assert [tuple(row[key] for key in ("a", "seed", "b")) for row in rows] == [
        ("1", "0", "x"),
        ("1", "1", "x"),
        ("2", "0", "y"),
        ("2", "1", "y"),
    ]


def test_what_is_typed_wins_over_parameters() -> None:
    space = parse_space(["a=3"], {"a": "1,2", "b": "range(3)"})
    assert grid(space, []) == [{"b": "0"}, {"b": "1"}, {"b": "2"}]
    assert space.overrides_for({"b": "1"}) == ["a=3", "b=1"]


def test_probes_have_each_value_once_and_a_ranges_ends() -> None:
    space = parse_space(["a=1,2,3", "seed=range(1000)", "lr=interval(0.1,1)"], {})
    assert space.coverage_jobs() == [
        ["a=1", "seed=0", "lr=0.1"],
        ["a=2", "seed=0", "lr=0.1"],
        ["a=3", "seed=0", "lr=0.1"],
        ["a=1", "seed=999", "lr=0.1"],
        ["a=1", "seed=0", "lr=1.0"],
    ]


def test_a_glob_stands_for_options() -> None:
    resolvers.register()
    words = ["-m", "experiment=glob(mnist_alexnet*)"]
    with open_composer(get_args_parser().parse_args(words)) as composing:
        rows = grid(composing.space, [])
    assert rows == [{"experiment": "mnist_alexnet"}, {"experiment": "mnist_alexnet_sgd"}]


def test_a_sweep_in_yaml_needs_no_flag() -> None:
    resolvers.register()
    with open_composer(get_args_parser().parse_args(["sweep=lr_grid", "model=mlp"])) as composing:
        assert composing.is_sweep
        assert len(grid(composing.space, [])) == 21
        assert (
            composing.space.overrides_for({"optimizer.lr": "1e-1", "seed": "2"})[-1] == "model=mlp"
        )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["optimizer.lr=interval(0.1,1)"],
            "interval(0.1,1) is an interval, not a list of values; it needs hydra/",
        ),
        (
            ["seed=0,1", "sweep.together=[[seed,optimizer.lr]]"],
            "names 'optimizer.lr', which is not",
        ),
        (
            ["seed=0,1", "optimizer.lr=1,2,3", "sweep.together=[[seed,optimizer.lr]]"],
            "seed has 2 values, optimizer.lr has 3 values; the numbers must be equal",
        ),
        (["seed=0,1", "sweep.together=[[seed],[seed]]"], "names 'seed' twice"),
        (["optimizer.lr=0.1,-1"], "optimizer"),
        (["model=mlp,alexnt"], "did you mean 'alexnet'?"),
        (["seed=0,1", "hydra/launcher=poool"], "launcher='poool' does not exist; allowed: basic,"),
        (["seed=0,1", "hydra/launcher=poool"], "did you mean 'pool'?"),
        (["seed=0,1", "hydra/sweeper=gird"], "did you mean 'grid'?"),
        (["seed=0,1", "hydra.sweep.subdir=${seed}"], "names its jobs' folders itself"),
        (["seed=0,1", "resume=auto"], "is for a single run; use sweep.resume for a sweep"),
        (["seed=0,1", "sweep.on_error=sotp"], "sweep.on_error='sotp'"),
        (["seed=0,1", "sweep.resume=nowhere"], "sweep.resume='nowhere' holds no sweep"),
        (["seed=0,1", "hydra/launcher=pool", "launch=inline"], "launch='inline': the pool starts"),
        (["seed=0,1", "hydra/launcher=pool", "hydra.launcher.slots=0"], "hydra.launcher.slots=0"),
        (
            ["seed=0,1", "hydra/launcher=pool", "hydra.launcher.gpus=[99]"],
            "hydra.launcher.gpus=[99]: there is no GPU 99",
        ),
        (["seed=0,1", "hydra/launcher=pool", "trainer.devices=[0,1]"], "the pool chooses them"),
    ],
)
def test_mistakes_are_named_before_anything_starts(words: list[str], told: str) -> None:
    assert told in sweep_errors(*words)


SEARCH = "hydra/sweeper=optuna"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["optimizer.lr=0.1"], "has nothing to search"),
        (
            ["optimizer.lr=tag(lgo,interval(0.1,1))"],
            "'lgo' is no tag known here; allowed: log; did",
        ),
        (["optimizer.lr=tag(log,interval(0,1))"], "a logarithm needs values above 0"),
        (["optimizer.lr=interval(1,0.1)"], "ends below its beginning"),
        (["seed=tag(log,choice(1,2))"], "log is for interval() and range()"),
        (["seed=0,1", "hydra.sweeper.direction=min"], "direction='min', but goal.mode='max'"),
        (["seed=0,1", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0; allowed: a number"),
        (
            ["seed=0,1", "hydra.sweeper.storage=sqlit"],
            "hydra.sweeper.storage='sqlit'; allowed: sql",
        ),
        (["optimizer.lr=interval(0.1,1)", "hydra/sweeper/sampler=grid"], "needs lists of values"),
        (["seed=0,1", "hydra/sweeper/sampler=tpo"], "did you mean 'tpe'?"),
        (["seed=0,1", "hydra.sweeper.sampler._target_=os.system"], "os.system"),
        (["seed=0,1", "hydra.sweeper.pruner.n_startup=3"], "n_startup"),
        (
            [
                "seed=0,1",
                "hydra/sweeper/pruner=median",
                "+hydra.sweeper.objectives.t={metric: train/loss, mode: min}",
            ],
            "where there are several objectives",
        ),
        (["seed=0,1", "+hydra.sweeper.objectives.t={metric: train/loss, mode: up}"], "mode"),
    ],
)
def test_mistakes_in_a_search_are_named(words: list[str], told: str) -> None:
    assert told in sweep_errors(SEARCH, *words)


def test_no_mistake_is_no_mistake() -> None:
    assert sweep_errors("optimizer.lr=0.1,0.01", "seed=0,1", "sweep.together=[[seed]]") == ""
    assert sweep_errors(SEARCH, "optimizer.lr=tag(log,interval(0.1,1))", "model=mlp,lenet") == ""


def test_hydras_sweeps_are_optunas_distributions() -> None:
    words = {
        "a": (FloatDistribution(0.1, 1.0), "interval(0.1,1)"),
        "b": (FloatDistribution(0.1, 1.0, log=True), "tag(log,interval(0.1,1))"),
        "c": (IntDistribution(1, 8, log=True), "tag(log,int(interval(1,8)))"),
        "d": (IntDistribution(1, 4), "range(1,5)"),
        "e": (IntDistribution(0, 8, step=4), "range(0,10,4)"),
        "f": (CategoricalDistribution([0.1, "x", None, True]), "0.1,x,null,true"),
        "g": (CategoricalDistribution(["[128]", "[64,64]"]), "[128],[64,64]"),
        "h": (FloatDistribution(0.25, 0.75, step=0.25), "range(0.25,1.0,0.25)"),
    }
    space = parse_space([f"{key}={text}" for key, (_, text) in words.items()], {})
    found = parse_search_space(space.swept)
    assert found.distributions == {key: one for key, (one, _) in words.items()}
    drawn = {"a": 0.1 + 0.2, "d": 3, "f": None, "g": "[64,64]"}
    assert found.to_values(drawn) == {"a": repr(0.1 + 0.2), "d": "3", "f": "null", "g": "[64,64]"}
    assert found.to_values({"f": True})["f"] == "True"


@pytest.mark.parametrize(
    "value",
    [1, True, None, 0.001, "a 'quoted' \\ {text}, [x]=", {"a": [1, "b"], "c": {"d": None}}, []],
)
def test_values_go_through_a_command_line(value: object) -> None:
    (override,) = parse_overrides([f"+x={to_override(value)}"])
    assert override.value() == value
    assert type(override.value()) is type(value)


def test_the_machine_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("app.sweep.launchers.slots._cores", lambda: 8)
    monkeypatch.setattr("app.sweep.launchers.slots._visible", lambda accelerator: list("4567"))  # noqa: ARG005
    pairs = make_slots("auto", 2, "auto", "auto")
    assert [slot.gpus for slot in pairs] == [("4", "5"), ("6", "7")]
    assert pairs[1].environment(2) == {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "6,7"}
    assert [slot.gpus for slot in make_slots("auto", None, 3, [0, 3])] == [("4",), ("7",), ("4",)]
    with pytest.raises(ConfigError, match="the pool has 1 GPUs"):
        make_slots("auto", 2, "auto", [0])
    monkeypatch.setattr("app.sweep.launchers.slots._visible", lambda accelerator: [])  # noqa: ARG005
    assert [slot.threads for slot in make_slots("cpu", 2, "auto", "auto")] == [2, 2, 2, 2]
    assert num_ranks("auto", 0) == num_ranks(None, 3) == 1


def test_the_users_own_number_of_threads_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (slot,) = make_slots("cpu", None, 1, "auto")
    assert slot.environment(1) == {"OMP_NUM_THREADS": "3"}


def test_only_completed_runs_are_averaged() -> None:
    table = pd.DataFrame(
        {
            "job": [0, 1, 2, 3],
            "status": ["completed", "completed", "failed", "pruned"],
            "lr": [0.1, 0.1, 0.1, 0.2],
            "seed": [0, 1, 2, 0],
            "best_accuracy": [0.5, 0.7, 0.1, 0.9],
            "seconds": [1.0, 3.0, 9.0, 9.0],
            "samples/s": [1.0, 1.0, None, 1.0],
        }
    )
    results = Results("", table, ["lr", "seed"], [MonitorConfig("accuracy", "max")], {})
    averages = aggregate_by_config(results)
    assert averages["lr"].tolist() == [0.1, 0.2]
    assert averages["jobs"].tolist() == [3, 1]
    assert averages["completed"].tolist() == [2, 0]
    assert averages["best_accuracy_mean"][0] == pytest.approx(0.6)
    assert averages["best_accuracy_std"][0] == pytest.approx(0.02**0.5)
    assert averages["seconds_mean"][0] == 2.0
    assert averages.loc[1, ["best_accuracy_mean", "best_accuracy_std"]].isna().all()


def test_the_best_stand_first_and_those_without_a_value_last() -> None:
    table = pd.DataFrame({"job": [0, 1, 2], "best_loss": [0.5, None, 0.2]})
    results = Results("", table, [], [MonitorConfig("loss", "min")], {})
    assert sort_by_goal(results)["job"].tolist() == [2, 0, 1]
    best = best_run(results)
    assert best is not None
    assert best["job"] == 2
    assert best_run(Results("", table.assign(best_loss=None), [], results.goals, {})) is None


def test_frozen_configuration_files_are_those_of_the_beginning(tmp_path: Path) -> None:
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
    from hydra.types import RunMode

    from app.sweep.folder import SweepFolder

    conf = tmp_path / "conf"
    conf.mkdir()
    (conf / "config.yaml").write_text("a: 1\n")
    search = ConfigSearchPathImpl()
    search.append("hydra", "pkg://hydra.conf")
    search.append("main", f"file://{conf}")
    search.append("schema", "structured://")
    loader = ConfigLoaderImpl(search)
    folder = SweepFolder(tmp_path / "sweep")
    folder.freeze(loader)
    (conf / "config.yaml").write_text("a: 2\n")
    frozen = folder.frozen_loader(loader)
    assert frozen.load_configuration("config", [], RunMode.RUN).a == 1
    assert loader.load_configuration("config", [], RunMode.RUN).a == 2
