"""Pruning: reports a run's progress to an Optuna study, and asks whether to end it early."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from app.config.instantiate import Instantiator
from app.config.schema import GoalConfig, OptunaTrial
from app.distributed.collectives import broadcast_object, rank
from app.training.history import History, goal_values

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

JOURNAL_PREFIX = "journal:"
DATABASE_TIMEOUT_SECONDS = 60  # how long to wait for other processes that lock a SQLite file


class Pruning:
    """Reports the value of the goal to a study, and asks its pruner.

    Args:
        trial: Trial of a study that this run belongs to; None if it belongs to none.
        goal: Metric to report.
    """

    def __init__(self, trial: OptunaTrial | None, goal: GoalConfig) -> None:
        self.trial, self.goal = trial, goal
        self.last_reported = 0

    def should_prune(self, history: History) -> bool:
        """Return whether to end the run now; all ranks must call this and get the same answer."""
        if self.trial is None:
            return False
        return broadcast_object(self._report_and_ask(history, self.trial) if rank() == 0 else False)

    def _report_and_ask(self, history: History, trial: OptunaTrial) -> bool:
        values = goal_values(history, self.goal)
        if not values or values[-1].number <= self.last_reported:
            return False
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.last_reported = values[-1].number
        storage = make_storage(trial.storage)
        pruner: Any = Instantiator()("hydra.sweeper.pruner", trial.pruner)
        study = optuna.load_study(study_name=trial.study, storage=storage, pruner=pruner)
        frozen = study.get_trials(deepcopy=False)[trial.number]
        storage.set_trial_intermediate_value(frozen._trial_id, self.last_reported, values[-1].value)
        return bool(pruner.prune(study, storage.get_trial(frozen._trial_id)))


def make_storage(url: str) -> BaseStorage:
    """Open the storage of a study.

    Args:
        url: `journal:<file>`, or the URL of a database.
    """
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if url.startswith(JOURNAL_PREFIX):
        return JournalStorage(JournalFileBackend(url.removeprefix(JOURNAL_PREFIX)))
    is_sqlite = url.startswith("sqlite:")
    engine_kwargs = {"connect_args": {"timeout": DATABASE_TIMEOUT_SECONDS}} if is_sqlite else {}
    return RDBStorage(url, engine_kwargs=engine_kwargs)
