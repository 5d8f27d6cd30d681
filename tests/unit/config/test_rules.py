"""Rules that involve several keys of a configuration."""

from __future__ import annotations

from app.config.schema import MonitorConfig
from tests.support.runs import config_issues


def test_config_with_invalid_monitor_is_rejected() -> None:
    issues = config_issues(
        "+checkpoint.monitors.a={metric: los, mode: min}", "+checkpoint.monitors.b={metric: loss}"
    )
    assert any("checkpoint.monitors.b.mode is missing" in issue for issue in issues)
    (issue,) = config_issues("+checkpoint.monitors.a={metric: los, mode: min}")
    assert issue.startswith("checkpoint.monitors.a.metric='los' is not measured in valid")
    assert MonitorConfig("train/loss", "min").stage == "train"
