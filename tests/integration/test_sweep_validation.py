"""Errors that are reported before the first job of a sweep starts."""

from __future__ import annotations

import pytest

from tests.support.sweeps import sweep_errors

SEARCH = "hydra/sweeper=optuna"
SEEDS = "seed=0,1"
POOL = "hydra/launcher=pool"


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (
            [
                *("optimizer.lr=interval(0.1,1)", SEEDS, "sweep.together=[[seed,a],[seed]]"),
                *("hydra.sweep.subdir=${seed}", "sweep.resume=nowhere"),
            ],
            [
                "interval(0.1,1) is an interval, not a list of values; it needs hydra/",
                "sweep.together names 'a', which is not swept; swept: optimizer.lr, seed",
                "sweep.together names 'seed' twice",
                "names the job folders itself",
                "sweep.resume='nowhere' is not the folder of a sweep",
            ],
        ),
        (
            [SEEDS, "optimizer.lr=1,2,3", "sweep.together=[[seed,optimizer.lr]]"],
            ["seed has 2 values, optimizer.lr has 3 values; the numbers must be equal"],
        ),
        (
            ["optimizer.lr=0.1,-1", "sweep.on_error=sotp"],
            ["Invalid learning rate: -1", "sweep.on_error='sotp'"],
        ),
        (["model=mlp,alexnt"], ["did you mean 'alexnet'?"]),
        (
            ["seed=0", "hydra/launcher=poool"],
            ["launcher='poool' does not exist; allowed: basic,", "did you mean 'pool'?"],
        ),
        (["seed=0", "hydra/sweeper=gird"], ["did you mean 'grid'?"]),
        (["seed=0", "resume=auto"], ["is for a single run; use sweep.resume for a sweep"]),
        (["seed=0", POOL, "launch=inline"], ["launch='inline': the pool starts"]),
        (
            ["seed=0", POOL, "hydra.launcher.slots=0"],
            ["hydra.launcher.slots=0; allowed: a number >= 1"],
        ),
        (
            ["seed=0", POOL, "hydra.launcher.gpus=[99]"],
            ["hydra.launcher.gpus=[99]: there is no GPU 99"],
        ),
        (["seed=0", POOL, "trainer.devices=[0,1]"], ["the pool assigns devices"]),
    ],
)
def test_check_sweep_invalid_grid_reports_errors(overrides: list[str], messages: list[str]) -> None:
    errors = sweep_errors("model=mlp", *overrides)
    assert [message for message in messages if message not in errors] == [], errors


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["optimizer.lr=0.1"], ["has nothing to search"]),
        (
            [
                "optimizer.lr=tag(lgo,interval(0.1,1))",
                "optimizer.weight_decay=tag(log,interval(0,1))",
                "model.dropout=interval(1,0.1)",
                "seed=tag(log,choice(1,2))",
                "hydra/sweeper/sampler=grid",
            ],
            [
                "unknown tag 'lgo'; allowed: log; did",
                "tag log needs values above 0",
                "the end of the interval is below its start",
                "tag log is only for interval() and range()",
            ],
        ),
        (
            [
                "optimizer.lr=interval(0.1,1)",
                "hydra/sweeper/sampler=grid",
                "hydra/sweeper/pruner=median",
                "+hydra.sweeper.objectives.t={metric: train/loss, mode: min}",
            ],
            ["needs lists of values", "cannot prune trials with several objectives"],
        ),
        (
            [
                SEEDS,
                "hydra.sweeper.direction=min",
                "hydra.sweeper.n_trials=0",
                "hydra.sweeper.storage=sqlit",
                "+hydra.sweeper.n_trial=3",
                "+hydra.sweeper.objectives.t={metric: train/loss, mode: up}",
            ],
            [
                "direction='min', but goal.mode='max'",
                "hydra.sweeper.n_trials=0 is not valid; allowed: an integer",
                "hydra.sweeper.storage='sqlit'; allowed: sql",
                "did you mean 'n_trials'?",
                "mode='up'",
            ],
        ),
        ([SEEDS, "hydra/sweeper/sampler=tpo"], ["did you mean 'tpe'?"]),
        ([SEEDS, "hydra.sweeper.pruner.n_startup=3"], ["n_startup"]),
        ([SEEDS, "hydra.sweeper.sampler._target_=os.system"], ["os.system"]),
    ],
)
def test_check_sweep_invalid_search_reports_errors(
    overrides: list[str], messages: list[str]
) -> None:
    errors = sweep_errors("model=mlp", SEARCH, *overrides)
    assert [message for message in messages if message not in errors] == [], errors


def test_check_sweep_valid_reports_nothing() -> None:
    assert sweep_errors("optimizer.lr=0.1,0.01", SEEDS, "sweep.together=[[seed]]") == ""
    assert sweep_errors(SEARCH, "optimizer.lr=tag(log,interval(0.1,1))", "model=mlp,lenet") == ""
