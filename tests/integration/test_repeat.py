"""`app repeat` with real runs."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.own_task import OWN_TASK_MODULE
from tests.support.runs import FEW_BATCHES, run_app


def test_repeat_own_task_needs_trust_and_is_equal(tmp_path: Path) -> None:
    (tmp_path / "own_task.py").write_text(OWN_TASK_MODULE)
    own = ("task._target_=own_task.NoisyTask", "+task.noise=0.1")
    trust = "trusted_targets=[own_task]"
    arguments = ["model=mlp", "trainer.max_epochs=1", "hydra.run.dir=run", *FEW_BATCHES, *own]
    assert run_app(tmp_path, *arguments, trust).code == 0
    record_file = tmp_path / "run" / "environment.json"
    record = json.loads(record_file.read_text())
    record["attempts"][0]["packages"]["torch"] = "1.0"
    record_file.write_text(json.dumps(record))

    refused = run_app(tmp_path, "repeat", "run")
    assert refused.code == 2
    assert "own_task" in refused.err
    assert not (tmp_path / "run_repeat").exists()

    repeated = run_app(tmp_path, "repeat", "run", trust)
    assert repeated.code == 0, repeated.err
    assert "weights: equal" in repeated.out
    assert "tables: equal" in repeated.out
    assert "warning: package torch: 1.0 before" in repeated.err
    (attempt,) = json.loads((tmp_path / "run_repeat" / "environment.json").read_text())["attempts"]
    assert attempt["data"] == record["attempts"][0]["data"]

    other = run_app(tmp_path, "repeat", "run", trust, "seed=1", "--output", "other")
    assert other.code == 1, other.err
    assert "first difference: epoch_details/epoch001_train.csv, row 1, column" in other.out
    assert "weights: different" in other.out
