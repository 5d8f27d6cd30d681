"""What a search thinks of a run that is under way: whether it is hopeless."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from app.config.instantiate import Build
from app.config.schema import GoalConfig, OptunaTrial
from app.distributed.collectives import broadcast_object, rank
from app.training.history import History, measured

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

JOURNAL = "journal:"
PRUNERS = "optuna.pruners"
SECONDS = 60  # in which another process is done with a database in a file


class Pruning:
    """Tells a study of the goal's value, and asks its pruner.

    Args:
        trial: Of the study; None where the run is of none.
        goal: Whose value is told.
    """

    def __init__(self, trial: OptunaTrial | None, goal: GoalConfig) -> None:
        self.trial, self.goal = trial, goal
        self.told = 0  # the last epoch

    def is_hopeless(self, history: History) -> bool:
        """Whether the run is to end now; all ranks must ask, and get the same answer."""
        if self.trial is None:
            return False
        return broadcast_object(self._asked(history, self.trial) if rank() == 0 else False)

    def _asked(self, history: History, trial: OptunaTrial) -> bool:
        values = measured(history, self.goal)
        if not values or values[-1].epoch <= self.told:
            return False
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.told = values[-1].epoch
        storage = storage_of(trial.storage)
        pruner: Any = Build([PRUNERS])("hydra.sweeper.pruner", trial.pruner)
        study = optuna.load_study(study_name=trial.study, storage=storage, pruner=pruner)
        frozen = study.get_trials(deepcopy=False)[trial.number]
        storage.set_trial_intermediate_value(frozen._trial_id, self.told, values[-1].value)
        return bool(pruner.prune(study, storage.get_trial(frozen._trial_id)))


def storage_of(text: str) -> BaseStorage:
    """Where a study is kept.

    Args:
        text: `journal:<file>`, or the address of a database.
    """
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if text.startswith(JOURNAL):
        return JournalStorage(JournalFileBackend(text.removeprefix(JOURNAL)))
    waits = {"connect_args": {"timeout": SECONDS}} if text.startswith("sqlite:") else {}
    return RDBStorage(text, engine_kwargs=waits)
