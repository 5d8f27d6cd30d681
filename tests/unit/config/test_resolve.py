"""Resolved configurations."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from app.config.resolve import resolve
from app.config.types import MISSING, UNKNOWN


def test_resolve_makes_paths_absolute_but_keeps_names_on_a_hub(tmp_cwd: Path) -> None:
    (tmp_cwd / "mine").mkdir()
    for path, expected in (("mine", str(tmp_cwd / "mine")), ("owner/pets", "owner/pets")):
        source = {"train": {"path": "${data.path}", "root": "new", "files": [{"path": "mine"}]}}
        config = OmegaConf.create({"ckpt": "a.pt", "data": {"path": path, "source": source}})
        plain, issues = resolve(config)
        train = plain["data"]["source"]["train"]
        assert issues == []
        assert (plain["data"]["path"], train["path"]) == (expected, expected)
        assert train["files"] == [{"path": str(tmp_cwd / "mine")}]
        assert (train["root"], plain["ckpt"]) == (str(tmp_cwd / "new"), str(tmp_cwd / "a.pt"))


def test_resolve_reports_references_that_lead_nowhere() -> None:
    config = OmegaConf.create({"a": "???", "b": "${a}", "c": ["${nothing}"]})
    plain, issues = resolve(config)
    assert plain == {"a": MISSING, "b": UNKNOWN, "c": [UNKNOWN]}
    assert [issue.key for issue in issues] == ["c.0"]
