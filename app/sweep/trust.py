"""What the words that a sweep was begun with may do when it is gone on with.

A sweep's folder may be a stranger's. What its words trust, and what they tell Hydra of files and
of the environment, counts only where it is typed now.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from app.config.allowlist import is_trusted, trusted_by_environment
from app.config.overrides import parse_overrides
from app.config.resolve import typed_trust
from app.runtime.errors import Mistake
from app.sweep.folder import SweepFolder

TRUST = "trusted_targets"
TYPED = ("hydra.job.", "hydra.job_logging", "hydra.hydra_logging", "hydra.output_subdir")
TYPED_TOO = ("hydra.searchpath", "hydra.run.", "hydra.sweep.", "hydra.overrides")


def trust_mistakes(folder: SweepFolder, typed: Sequence[str]) -> Iterator[Mistake]:
    """Saved words that would have to be typed.

    Args:
        folder: Of the sweep.
        typed: What is typed now.
    """
    now = [word for word in typed if _key(word) == TRUST]
    trusted = [*typed_trust(parse_overrides(now)), *trusted_by_environment()]
    of_jobs = dict.fromkeys(word for job in folder.jobs for word in job.words)
    for word in dict.fromkeys([*folder.words, *of_jobs]):
        key = _key(word)
        if key == TRUST and word not in typed:
            names = typed_trust(parse_overrides([word]))
            own = all(is_trusted(name, trusted) for name in names)
        else:
            own = word in typed or not key.startswith((TRUST, *TYPED, *TYPED_TOO))
            own = own and not (word in of_jobs and key.startswith("hydra"))
        if not own:
            problem = f": the sweep was begun with {word}; type it, too, if you trust it"
            yield Mistake("sweep.resume", problem)


def _key(word: str) -> str:
    return word.partition("=")[0].strip().lstrip("+~")
