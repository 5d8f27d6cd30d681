"""What a search thinks of a run that is under way: whether it is hopeless."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from app.config.instantiate import Instantiator
from app.config.schema import GoalConfig, OptunaTrial
from app.distributed.collectives import broadcast_object, rank
from app.training.history import History, goal_values

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

JOURNAL = "journal:"
PRUNERS = "optuna.pruners"
DATABASE_TIMEOUT_SECONDS = 60  # in which another process is done with a database in a file


class Pruning:
    """Tells a study of the goal's value, and asks its pruner.

    Args:
        trial: Of the study; None where the run is of none.
        goal: Whose value is told.
    """

    def __init__(self, trial: OptunaTrial | None, goal: GoalConfig) -> None:
        self.trial, self.goal = trial, goal
        self.last_reported_epoch = 0  # the last epoch

    def should_prune(self, history: History) -> bool:
        """Whether the run is to end now; all ranks must ask, and get the same answer."""
        if self.trial is None:
            return False
        return broadcast_object(self._asked(history, self.trial) if rank() == 0 else False)

    def _asked(self, history: History, trial: OptunaTrial) -> bool:
        values = goal_values(history, self.goal)
        if not values or values[-1].epoch <= self.last_reported_epoch:
            return False
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.last_reported_epoch = values[-1].epoch
        storage = make_storage(trial.storage)
        pruner: Any = Instantiator([PRUNERS])("hydra.sweeper.pruner", trial.pruner)
        study = optuna.load_study(study_name=trial.study, storage=storage, pruner=pruner)
        frozen = study.get_trials(deepcopy=False)[trial.number]
        storage.set_trial_intermediate_value(
            frozen._trial_id, self.last_reported_epoch, values[-1].value
        )
        return bool(pruner.prune(study, storage.get_trial(frozen._trial_id)))


def make_storage(text: str) -> BaseStorage:
    """Where a study is kept.

    Args:
        text: `journal:<file>`, or the address of a database.
    """
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if text.startswith(JOURNAL):
        return JournalStorage(JournalFileBackend(text.removeprefix(JOURNAL)))
    waits = {"connect_args": {"timeout": DATABASE_TIMEOUT_SECONDS}} if text.startswith("sqlite:") else {}
    return RDBStorage(text, engine_kwargs=waits)
