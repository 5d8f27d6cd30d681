"""Division of the machine into slots."""

from __future__ import annotations

import pytest

from app.runtime.errors import ConfigError
from app.sweep.launchers import slots
from app.sweep.launchers.slots import make_slots, num_ranks


def test_make_slots_divides_gpus_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(slots, "num_cores", lambda: 8)
    monkeypatch.setattr(slots, "_visible_gpus", lambda accelerator: list("4567"))  # noqa: ARG005
    pairs = make_slots("auto", 2, "auto", "auto")
    assert [slot.gpus for slot in pairs] == [("4", "5"), ("6", "7")]
    assert pairs[1].environment(2) == {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "6,7"}
    assert [slot.gpus for slot in make_slots("auto", None, 3, [0, 3])] == [("4",), ("7",), ("4",)]
    with pytest.raises(ConfigError, match="the pool has 1 GPUs"):
        make_slots("auto", 2, "auto", [0])
    monkeypatch.setattr(slots, "_visible_gpus", lambda accelerator: [])  # noqa: ARG005
    assert [slot.threads for slot in make_slots("cpu", 2, "auto", "auto")] == [2, 2, 2, 2]
    assert num_ranks("auto", 0) == num_ranks(None, 3) == 1


def test_slot_environment_keeps_user_omp_num_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (slot,) = make_slots("cpu", None, 1, "auto")
    assert slot.environment(1) == {"OMP_NUM_THREADS": "3"}
