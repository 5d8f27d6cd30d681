"""What no single key of a configuration can tell."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.runtime.errors import ConfigIssue, nearest, one_of

STAGES = ("train", "valid", "test")
RESERVED = (
    "epoch",
    "iter",
    "stage",
    "loss",
    "num_samples",
    "lr",
    "gradient_norm",
    "iter_time",
    "epoch_time",
    "loss_mean",
    "loss_std",
    "total_samples",
    "samples/s",
    "memory_mb",
)
SUPERVISED = (
    "app.training.supervised.SupervisedTask"  # whose columns are known from the configuration alone
)
USES_CKPT = ("test", "valid", "predict", "export")  # modes that use what was trained


def rule_issues(plain: dict[str, Any], broken: tuple[str, ...]) -> Iterator[ConfigIssue]:
    """What no single key can tell; a rule is left out where a key that it reads is broken."""
    data = ("data.source", "data.split", "trainer.overfit_batches")
    rules = {
        _mode_mistakes: ("mode", "ckpt"),
        _stage_mistakes: ("mode", "predict", *data),
        _input_mistakes: ("data.inputs", "data.normalize"),
        _monitor_mistakes: ("goal", "checkpoint", "task", "metric", "loss", *data),
        _resume_mistakes: ("mode", "resume", "trainer.requeue"),
        _length_mistakes: ("trainer.max_epochs", "trainer.max_steps"),
        _time_mistakes: ("trainer.max_time",),
        _device_mistakes: ("mode", "trainer", "task", "callbacks", "data"),
        _name_mistakes: ("name", "metric", "loss", "task"),
        _find_mistakes: ("mode", "find"),
        _scheduler_mistakes: ("scheduler",),
    }
    for rule, keys in rules.items():
        if not any(bad.startswith(key) or key.startswith(bad) for bad in broken for key in keys):
            yield from rule(plain)


def _length_mistakes(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    if plain["trainer"]["max_epochs"] is None and plain["trainer"]["max_steps"] is None:
        yield ConfigIssue(
            "trainer.max_epochs", "=None and trainer.max_steps=None: one must be given"
        )


def _resume_mistakes(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    resume, mode = plain["resume"], plain["mode"]
    if resume is not None and mode != "train":
        yield ConfigIssue("resume", f"={resume!r} has no use in mode={mode}; allowed: mode=train")
    if plain["trainer"]["requeue"] and resume is None and mode == "train":
        problem = "=True starts the job again, which would begin anew; give resume=auto, too"
        yield ConfigIssue("trainer.requeue", problem)


def _time_mistakes(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    value = plain["trainer"]["max_time"]
    if isinstance(value, str) and seconds_of(value) is None:
        allowed = "allowed: seconds, HH:MM:SS or DD:HH:MM:SS"
        yield ConfigIssue("trainer.max_time", f"={value!r} is no time; {allowed}")


def seconds_of(time: str | float | None) -> float | None:
    """Seconds in a time such as `01:30:00` or `2:00:00:00`, days first; None where it is none."""
    if not isinstance(time, str):
        return time
    found = re.fullmatch(r"(?:(\d+):)?(\d+):([0-5]?\d):([0-5]?\d)", time)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return (((days * 24 + hours) * 60 + minutes) * 60 + seconds) or None


def _device_mistakes(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    trainer, data = plain["trainer"], plain["data"]
    devices, key = trainer["devices"], "trainer.devices"
    if isinstance(devices, list) and (not devices or len({*devices}) < len(devices)):
        yield ConfigIssue(key, f"={devices!r}: allowed: ids, each once")
    count = len(devices) if isinstance(devices, list) else devices
    for name in ("batch_size", "eval_batch_size"):
        size = data[name]
        if isinstance(count, int) and size is not None and size < count:
            problem = f"={size} is for all devices together, and fewer than the {count} of {key}"
            yield ConfigIssue(f"data.{name}", problem)
    if (
        trainer["batch_size_finder"]
        and plain["mode"] == "train"
        and (count or 1) not in (1, "auto")
    ):
        problem = f"=True searches on one device, but {key}={devices!r}; allowed: 1, null"
        yield ConfigIssue("trainer.batch_size_finder", problem)
    if trainer["strategy"] == "fsdp":
        yield from _sharding_mistakes(plain)
    if trainer["strategy"] == "fsdp" and trainer["precision"] == "fp16":
        problem = "='fp16' does not go with trainer.strategy='fsdp'; allowed: auto, fp32, bf16"
        yield ConfigIssue("trainer.precision", problem)


def _sharding_mistakes(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    """What needs whole weights, or calls the model more often in one rank than in another."""
    alone = "does not go with trainer.strategy='fsdp'; allowed: trainer.strategy=ddp"
    if plain["trainer"]["channels_last"] is True:
        yield ConfigIssue("trainer.channels_last", f"=True {alone}, auto, false")
    if plain["task"].get("patches"):
        yield ConfigIssue("task.patches", f" {alone}")
    for name, node in plain["callbacks"].items():
        for option in ("graph", "histograms_every_n_epochs"):
            if isinstance(node, dict) and node.get(option):
                yield ConfigIssue(f"callbacks.{name}.{option}", f"={node[option]!r} {alone}")


def _name_mistakes(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    if not re.fullmatch(r"[\w.+=,-]+", plain["name"]):
        yield ConfigIssue(
            "name", f"={plain['name']!r} names a folder: letters, digits and _.+=,- only"
        )
    named = {f"metric.{stage}": plain["metric"][stage] for stage in STAGES}
    for key, nodes in (named | {"loss": plain["loss"]}).items():
        for name in nodes:
            if not re.fullmatch(r"\w[\w.+=,@-]*", str(name)):
                problem = " names a column and a file: letters, digits and _.+=,@- only"
                yield ConfigIssue(f"{key}.{name}", problem)
    for stage in STAGES:
        for name in plain["metric"][stage].keys() & set(RESERVED):
            yield ConfigIssue(f"metric.{stage}.{name}", " is the name of another column; rename it")
    terms = {name for name, node in plain["loss"].items() if node}
    for name in terms & set(RESERVED):
        yield ConfigIssue(f"loss.{name}", " is the name of another column; rename it")
    for stage in STAGES:
        for name in _term_columns(plain) & plain["metric"][stage].keys():
            yield ConfigIssue(f"metric.{stage}.{name}", " is the column of a loss term; rename it")
    if plain["task"].get("_target_") == SUPERVISED and not any(plain["loss"].values()):
        yield ConfigIssue("loss", " has no term; choose one, as loss=cross_entropy")


def _term_columns(plain: dict[str, Any]) -> set[str]:
    """What the loss adds to the tables beside the total: nothing where that is its only term."""
    terms = {name: node for name, node in plain["loss"].items() if node}
    weights = [node.get("weight", 1) for node in terms.values()]
    if len(terms) < 2 and all(weight == 1 for weight in weights):
        return set()
    changing = [n for n, w in zip(terms, weights, strict=True) if isinstance(w, dict)]
    return {*terms, *(f"{name}_weight" for name in changing)}


def _is_scheduled(plain: dict[str, Any], column: str) -> bool:
    """Whether it is the weight of a term that only training knows."""
    term = plain["loss"].get(column.removesuffix("_weight")) or {}
    weight = term.get("weight") if column.endswith("_weight") else None
    return isinstance(weight, dict) and str(weight.get("_target_")).endswith(".Scheduled")


def _mode_mistakes(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    mode, ckpt = plain["mode"], plain["ckpt"]
    if mode in USES_CKPT and ckpt is None:
        yield ConfigIssue(
            "ckpt", f" has no value: mode={mode} needs a run folder or a checkpoint file"
        )
    if mode not in (*USES_CKPT, "check") and ckpt is not None:
        allowed = ", ".join(f"mode={other}" for other in USES_CKPT)
        yield ConfigIssue("ckpt", f"={ckpt!r} has no use in mode={mode}; allowed: {allowed}")
    if ckpt is not None and not Path(ckpt).exists():
        yield ConfigIssue("ckpt", f"={ckpt!r} does not exist")


def stages_with_data(plain: dict[str, Any]) -> set[str]:
    """The stages that have a source of their own or are cut from the training data."""
    source, split = plain["data"]["source"], plain["data"]["split"]
    overfit = plain["trainer"]["overfit_batches"] > 0 and plain["mode"] == "train"
    return {
        stage
        for stage in STAGES
        if source[stage] is not None or split.get(stage) or (overfit and stage == "valid")
    }


def _stage_mistakes(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    source, split = plain["data"]["source"], plain["data"]["split"]
    for stage in ("valid", "test"):
        if source[stage] is not None and split[stage] is not None:
            yield ConfigIssue(
                f"data.split.{stage}",
                f"={split[stage]!r} and data.source.{stage} are both given; allowed: one of them",
            )
    needed = _stage_of(plain)
    if needed is not None and needed not in stages_with_data(plain):
        cut = "" if needed == "train" else f" or data.split.{needed}"
        key = "predict.stage" if plain["mode"] == "predict" else "mode"
        value = needed if plain["mode"] == "predict" else plain["mode"]
        yield ConfigIssue(key, f"={value!r} has no data: give data.source.{needed}{cut}")


def _stage_of(plain: dict[str, Any]) -> str | None:
    """The stage that must have data; None where none must."""
    mode = plain["mode"]
    if mode in ("find_lr", "find_batch_size"):
        return "train"
    if mode == "predict":
        return None if plain["predict"]["images"] else str(plain["predict"]["stage"])
    return mode if mode in STAGES else None


def _input_mistakes(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    inputs, normalize = plain["data"]["inputs"], plain["data"]["normalize"]
    if inputs is None and normalize is not None:
        yield ConfigIssue(
            "data.inputs", "=None: a whole batch cannot be normalised; data.normalize=null"
        )


def _scheduler_mistakes(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    node = plain["scheduler"]["lr_scheduler"] or {}
    by_step = plain["scheduler"]["interval"] == "step"
    if by_step and str(node.get("_target_")).endswith(".ReduceLROnPlateau"):
        yield ConfigIssue(
            "scheduler.interval", "='step': a plateau is seen after epochs; allowed: epoch"
        )


def _find_mistakes(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    low, high = plain["find"]["lr_from"], plain["find"]["lr_to"]
    if low >= high:
        yield ConfigIssue("find.lr_from", f"={low} must be below find.lr_to={high}")


def _monitor_mistakes(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    """The goal, and the further monitors, are measured."""
    yield from _measured_mistakes(plain, "goal.metric", plain["goal"]["metric"])
    for name, monitor in plain["checkpoint"]["monitors"].items():
        if monitor is not None:
            key = f"checkpoint.monitors.{name}"
            if not re.fullmatch(r"[\w.+=,-]+", name):
                yield ConfigIssue(key, " names a file: letters, digits and _.+=,- only")
            yield from _measured_mistakes(plain, f"{key}.metric", monitor["metric"])


def _measured_mistakes(plain: dict[str, Any], key: str, metric: str) -> Iterator[ConfigIssue]:
    stage, name = metric.split("/", 1) if "/" in metric else ("valid", metric)
    if stage not in ("train", "valid"):
        yield ConfigIssue(key, f"={metric!r}: {stage!r} is no stage of training: train, valid")
        return
    if stage not in stages_with_data(plain):
        yield ConfigIssue(
            key,
            f"={metric!r} has no data to be measured on: give data.source.{stage} or "
            f"data.split.{stage}, or choose train/loss",
        )
        return
    metrics = [n for n, node in plain["metric"][stage].items() if node]
    own = [column for column in _term_columns(plain) if not _is_scheduled(plain, column)]
    measured = ["loss", *own, *metrics]
    if plain["task"].get("_target_") == SUPERVISED and name not in measured:
        yield ConfigIssue(
            key,
            f"={metric!r} is not measured in {stage}; it has: {one_of(measured)}"
            f"{nearest(name, measured)}",
        )
