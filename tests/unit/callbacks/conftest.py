"""Fixtures of the callback tests."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.runs import job_for


@pytest.fixture(scope="session")
def config() -> dict[str, Any]:
    """Complete resolved configuration of a run."""
    return job_for("model=mlp").plain
