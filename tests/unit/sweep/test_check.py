"""Errors that are reported before the first job of a sweep starts."""

from __future__ import annotations

import pytest

from tests.support.sweeps import sweep_errors

SEARCH = "hydra/sweeper=optuna"
SEEDS = "seed=0,1"
POOL = "hydra/launcher=pool"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["optimizer.lr=interval(0.1,1)"],
            "interval(0.1,1) is an interval, not a list of values; it needs hydra/",
        ),
        ([SEEDS, "sweep.together=[[seed,optimizer.lr]]"], "names 'optimizer.lr', which is not"),
        (
            [SEEDS, "optimizer.lr=1,2,3", "sweep.together=[[seed,optimizer.lr]]"],
            "seed has 2 values, optimizer.lr has 3 values; the numbers must be equal",
        ),
        ([SEEDS, "sweep.together=[[seed],[seed]]"], "names 'seed' twice"),
        (["optimizer.lr=0.1,-1"], "optimizer"),
        (["model=mlp,alexnt"], "did you mean 'alexnet'?"),
        ([SEEDS, "hydra/launcher=poool"], "launcher='poool' does not exist; allowed: basic,"),
        ([SEEDS, "hydra/launcher=poool"], "did you mean 'pool'?"),
        ([SEEDS, "hydra/sweeper=gird"], "did you mean 'grid'?"),
        ([SEEDS, "hydra.sweep.subdir=${seed}"], "names the job folders itself"),
        ([SEEDS, "resume=auto"], "is for a single run; use sweep.resume for a sweep"),
        ([SEEDS, "sweep.on_error=sotp"], "sweep.on_error='sotp'"),
        ([SEEDS, "sweep.resume=nowhere"], "sweep.resume='nowhere' is not the folder of a sweep"),
        ([SEEDS, POOL, "launch=inline"], "launch='inline': the pool starts"),
        ([SEEDS, POOL, "hydra.launcher.slots=0"], "hydra.launcher.slots=0; allowed: a number >= 1"),
        (
            [SEEDS, POOL, "hydra.launcher.gpus=[99]"],
            "hydra.launcher.gpus=[99]: there is no GPU 99",
        ),
        ([SEEDS, POOL, "trainer.devices=[0,1]"], "the pool assigns devices"),
    ],
)
def test_check_sweep_invalid_grid_reports_error(overrides: list[str], message: str) -> None:
    assert message in sweep_errors(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lr=0.1"], "has nothing to search"),
        (["optimizer.lr=tag(lgo,interval(0.1,1))"], "unknown tag 'lgo'; allowed: log; did"),
        (["optimizer.lr=tag(log,interval(0,1))"], "tag log needs values above 0"),
        (["optimizer.lr=interval(1,0.1)"], "the end of the interval is below its start"),
        (["seed=tag(log,choice(1,2))"], "tag log is only for interval() and range()"),
        ([SEEDS, "hydra.sweeper.direction=min"], "direction='min', but goal.mode='max'"),
        (
            [SEEDS, "hydra.sweeper.n_trials=0"],
            "hydra.sweeper.n_trials=0 is not valid; allowed: an integer",
        ),
        ([SEEDS, "hydra.sweeper.storage=sqlit"], "hydra.sweeper.storage='sqlit'; allowed: sql"),
        ([SEEDS, "+hydra.sweeper.n_trial=3"], "did you mean 'n_trials'?"),
        (["optimizer.lr=interval(0.1,1)", "hydra/sweeper/sampler=grid"], "needs lists of values"),
        ([SEEDS, "hydra/sweeper/sampler=tpo"], "did you mean 'tpe'?"),
        ([SEEDS, "hydra.sweeper.sampler._target_=os.system"], "os.system"),
        ([SEEDS, "hydra.sweeper.pruner.n_startup=3"], "n_startup"),
        (
            [
                SEEDS,
                "hydra/sweeper/pruner=median",
                "+hydra.sweeper.objectives.t={metric: train/loss, mode: min}",
            ],
            "cannot prune trials with several objectives",
        ),
        ([SEEDS, "+hydra.sweeper.objectives.t={metric: train/loss, mode: up}"], "mode"),
    ],
)
def test_check_sweep_invalid_search_reports_error(overrides: list[str], message: str) -> None:
    assert message in sweep_errors(SEARCH, *overrides)


def test_check_sweep_valid_reports_nothing() -> None:
    assert sweep_errors("optimizer.lr=0.1,0.01", SEEDS, "sweep.together=[[seed]]") == ""
    assert sweep_errors(SEARCH, "optimizer.lr=tag(log,interval(0.1,1))", "model=mlp,lenet") == ""
