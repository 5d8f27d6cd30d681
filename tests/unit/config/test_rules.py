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


def test_config_with_min_epochs_above_max_epochs_is_rejected() -> None:
    (issue,) = config_issues("model=mlp", "trainer.min_epochs=6", "trainer.max_epochs=5")
    assert issue == "trainer.min_epochs=6 is above trainer.max_epochs=5"


def test_config_of_compile_takes_a_bool_a_mode_or_arguments() -> None:
    for value in ("true", "max-autotune", "{dynamic: true}", "{backend: eager, fullgraph: true}"):
        assert config_issues("model=mlp", f"trainer.compile={value}") == []
    (issue,) = config_issues(
        "model=cnn", "trainer.compile=true", "trainer.gradient_checkpointing=true"
    )
    assert issue.endswith(
        "=True and trainer.gradient_checkpointing are both set; allowed: one of them"
    )
    (issue,) = config_issues("model=mlp", "trainer.compile=max-autotun")
    assert issue.endswith("did you mean 'max-autotune'?")
    (issue,) = config_issues("model=mlp", "trainer.compile={options: {cpp.cxx: [evil]}}")
    assert issue.startswith("trainer.compile.options=")


def test_config_of_cuda_graph_names_what_cannot_be_combined_with_it() -> None:
    graph = ("model=mlp", "trainer.cuda_graph=true")
    assert config_issues(*graph) == []
    obstacles = {
        "trainer.accumulate_grad_batches=2": "trainer.accumulate_grad_batches=1",
        "trainer.on_nonfinite=skip": "stop, raise",
        "trainer.precision=16-mixed": "auto, fp32, bf16, bf16-true",
        "trainer.compile=reduce-overhead": "false, true",
        "trainer.devices=2": "null, 1",
        "average=ema": "average=null",
        "optimizer=rmsprop": "Adam, AdamW, SGD",
    }
    for override, allowed in obstacles.items():
        (issue,) = config_issues(*graph, override)
        assert issue.startswith("trainer.cuda_graph=True"), override
        assert issue.endswith(allowed), issue
