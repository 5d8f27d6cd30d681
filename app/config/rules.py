"""Rules of the configuration that involve several keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.config.schema import PRECISION_ALIASES, STAGES
from app.config.types import UNKNOWN
from app.runtime.errors import ConfigIssue, did_you_mean, join_choices

CKPT_MODES = ("test", "valid", "predict", "export")  # modes that require a checkpoint
DISTILL_TASK = "app.training.distill.DistillTask"
# Tasks whose columns follow from the configuration.
SUPERVISED_TASKS = ("app.training.supervised.SupervisedTask", DISTILL_TASK)
DISTILL_COLUMNS = ("task_loss", "distillation_loss")  # of training
DETECTION_TASK = "app.training.detection.DetectionTask"
FILE_SOURCES = {  # the argument that names a file or a folder, and which of both
    "app.data.arrays.csv": ("path", "file"),
    "app.data.arrays.npz": ("path", "file"),
    "app.data.coco.coco_folder": ("root", "folder"),
    "app.data.images.image_folder": ("root", "folder"),
    "app.data.masks.mask_folder": ("root", "folder"),
}
FUSED_OPTIMIZERS = ("Adam", "AdamW", "SGD")  # of torch.optim
GRAPH_MODES = ("reduce-overhead", "max-autotune")  # of torch.compile, with graphs of their own
RESERVED_COLUMNS = (
    "epoch",
    "iter",
    "stage",
    "loss",
    "num_samples",
    "lr",
    "gradient_norm",
    "data_time",
    "iter_time",
    "epoch_time",
    "loss_mean",
    "loss_std",
    "total_samples",
    "samples/s",
    "memory_mb",
)


def rule_issues(plain: dict[str, Any], invalid_keys: tuple[str, ...]) -> Iterator[ConfigIssue]:
    """Yield the violations of all rules whose keys have valid values.

    Args:
        plain: Resolved configuration.
        invalid_keys: Keys with issues of their own; rules that read one of them are skipped.
    """
    data = ("data.source", "data.split", "data.folds", "trainer.overfit_batches")
    rules = {
        _mode_issues: ("mode", "ckpt"),
        _stage_issues: ("mode", "predict", *data),
        _validation_issues: ("mode", "trainer.valid_every_n_steps", *data),
        _fold_issues: ("data.folds", "data.fold", "data.source", "data.split"),
        _input_issues: ("data.inputs", "data.normalize"),
        _class_issues: ("data.num_classes", "data.class_names", "data.class_weights", "task"),
        _path_issues: ("mode", "data.path", "data.source", "predict"),
        _monitor_issues: ("goal", "checkpoint", "task", "metric", "loss", *data),
        _teacher_issues: ("mode", "task", "teacher"),
        _resume_issues: ("mode", "resume", "trainer.requeue"),
        _length_issues: ("trainer.max_epochs", "trainer.max_steps", "trainer.min_epochs"),
        _time_issues: ("trainer.max_time",),
        _compile_issues: ("trainer.compile", "trainer.gradient_checkpointing"),
        _graph_issues: ("trainer", "optimizer", "average", "loss"),
        _device_issues: ("mode", "trainer", "task", "callbacks", "data"),
        _name_issues: ("name", "metric", "loss", "task"),
        _tuner_issues: ("mode", "find"),
        _export_issues: ("mode", "export", "task"),
        _scheduler_issues: ("scheduler",),
    }
    for rule, keys in rules.items():
        if not any(
            bad.startswith(key) or key.startswith(bad) for bad in invalid_keys for key in keys
        ):
            yield from rule(plain)


def _mode_issues(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    mode, ckpt = plain["mode"], plain["ckpt"]
    if mode in CKPT_MODES and ckpt is None:
        yield ConfigIssue(
            "ckpt", f" has no value: mode={mode} needs a run folder or a checkpoint file"
        )
    if mode not in (*CKPT_MODES, "check") and ckpt is not None:
        allowed = ", ".join(f"mode={other}" for other in CKPT_MODES)
        problem = (
            f"={ckpt!r} is not used in mode={mode}; allowed: {allowed}; "
            f"to start a new training from its weights: init.weights={ckpt}"
        )
        yield ConfigIssue("ckpt", problem)
    if ckpt is not None and not Path(ckpt).exists():
        yield ConfigIssue("ckpt", f"={ckpt!r} does not exist")


def _stage_issues(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    source, split = plain["data"]["source"], plain["data"]["split"]
    for stage in ("valid", "test"):
        if source[stage] is not None and split[stage] is not None:
            yield ConfigIssue(
                f"data.split.{stage}",
                f"={split[stage]!r} and data.source.{stage} are both set; allowed: one of them",
            )
    required = _required_stage(plain)
    if required is not None and required not in stages_with_data(plain):
        alternative = "" if required == "train" else f" or data.split.{required}"
        key = "predict.stage" if plain["mode"] == "predict" else "mode"
        value = required if plain["mode"] == "predict" else plain["mode"]
        yield ConfigIssue(key, f"={value!r} has no data: set data.source.{required}{alternative}")


def _validation_issues(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    steps = plain["trainer"]["valid_every_n_steps"]
    if plain["mode"] == "train" and steps is not None and "valid" not in stages_with_data(plain):
        problem = f"={steps} needs validation data: set data.split.valid or data.source.valid"
        yield ConfigIssue("trainer.valid_every_n_steps", problem)


def _required_stage(plain: dict[str, Any]) -> str | None:
    """Return the stage that must have data, or None."""
    mode = plain["mode"]
    if mode in ("find_lr", "find_batch_size"):
        return "train"
    if mode == "predict":
        return None if plain["predict"]["images"] else str(plain["predict"]["stage"])
    return mode if mode in STAGES else None


def stages_with_data(plain: dict[str, Any]) -> set[str]:
    """Stages that have a data source of their own or a split of the training data."""
    source, split = plain["data"]["source"], plain["data"]["split"]
    overfit = plain["trainer"]["overfit_batches"] > 0 and plain["mode"] == "train"
    has_valid = overfit or plain["data"]["folds"] is not None
    return {
        stage
        for stage in STAGES
        if source[stage] is not None or split.get(stage) or (has_valid and stage == "valid")
    }


def _fold_issues(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    data = plain["data"]
    folds, fold = data["folds"], data["fold"]
    if folds is None and fold > 0:
        yield ConfigIssue("data.fold", f"={fold} needs data.folds, the number of folds")
    elif folds is not None and fold >= folds:
        yield ConfigIssue("data.fold", f"={fold} is not a fold; allowed: 0 to {folds - 1}")
    if folds is not None and data["source"]["valid"] is not None:
        problem = f"={folds} and data.source.valid are both set; allowed: one of them"
        yield ConfigIssue("data.folds", problem)
    pattern = data["split"]["group_pattern"]
    try:
        groups = 1 if pattern is None else re.compile(pattern).groups
    except re.error as error:
        problem = f"={pattern!r} is not a regular expression: {error}"
        yield ConfigIssue("data.split.group_pattern", problem)
        return
    if groups != 1:
        problem = f"={pattern!r} must have one group in brackets, such as '(patient[0-9]+)_'"
        yield ConfigIssue("data.split.group_pattern", problem)


def _input_issues(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    inputs, normalize = plain["data"]["inputs"], plain["data"]["normalize"]
    if inputs is None and normalize is not None:
        yield ConfigIssue(
            "data.inputs", "=None: a whole batch cannot be normalized; set data.normalize=null"
        )


def _class_issues(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    names, count = plain["data"]["class_names"], plain["data"]["num_classes"]
    weights = plain["data"]["class_weights"]
    if count == 1 and plain["task"].get("_target_") in SUPERVISED_TASKS:
        yield ConfigIssue("data.num_classes", "=1; allowed: 2 or more; 1 with task=detection")
    if isinstance(weights, list) and isinstance(count, int) and len(weights) != count:
        problem = f" has {len(weights)} values; allowed: one for each of {count} classes"
        yield ConfigIssue("data.class_weights", problem)
    if not isinstance(names, list):
        return
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        yield ConfigIssue("data.class_names", f" has the name {twice!r} twice")
    if isinstance(count, int) and len(names) != count:
        problem = f"={count}, but data.class_names has {len(names)} names: {join_choices(names)}"
        yield ConfigIssue("data.num_classes", problem)


def _path_issues(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    """Check that the files and folders that the mode reads exist."""
    mode, data = plain["mode"], plain["data"]
    if mode == "export" or (mode == "predict" and plain["predict"]["images"] is not None):
        return
    required = _required_stage(plain)
    stages = STAGES if required in (None, "train") else (required,)
    nodes = {stage: data["source"][stage] for stage in stages if data["source"][stage]}
    for stage, node in (nodes or {"train": data["source"]["train"] or {}}).items():
        name, kind = FILE_SOURCES.get(str(node.get("_target_")), ("", ""))
        path = node.get(name)
        if not isinstance(path, str) or path == UNKNOWN:
            continue
        if not _exists(Path(path), kind):
            is_data_path = data["path"] is not None and Path(data["path"]).absolute() == Path(path)
            key = "data.path" if is_data_path else f"data.source.{stage}.{name}"
            yield ConfigIssue(key, f"={path!r} is not a {kind}")


def _exists(path: Path, kind: str) -> bool:
    try:
        return path.is_dir() if kind == "folder" else path.is_file()
    except OSError:  # not even a path
        return False


def _monitor_issues(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    """Check that the goal and the monitors of checkpoints are measured."""
    yield from _metric_issues(plain, "goal.metric", plain["goal"]["metric"])
    for name, monitor in plain["checkpoint"]["monitors"].items():
        if monitor is not None:
            key = f"checkpoint.monitors.{name}"
            if not re.fullmatch(r"[\w.+=,-]+", name):
                yield ConfigIssue(key, " is part of a file name; allowed: letters, digits, _.+=,-")
            yield from _metric_issues(plain, f"{key}.metric", monitor["metric"])


def _metric_issues(plain: dict[str, Any], key: str, metric: str) -> Iterator[ConfigIssue]:
    stage, name = metric.split("/", 1) if "/" in metric else ("valid", metric)
    if stage not in ("train", "valid"):
        yield ConfigIssue(
            key, f"={metric!r}: {stage!r} is not a stage of training; allowed: train, valid"
        )
        return
    if stage not in stages_with_data(plain):
        yield ConfigIssue(
            key,
            f"={metric!r} cannot be measured without {stage} data: set data.source.{stage} or "
            f"data.split.{stage}, or choose train/loss",
        )
        return
    if plain["task"].get("_target_") == DETECTION_TASK and metric in ("loss", "valid/loss"):
        problem = f"={metric!r}: a detector has no loss in valid; choose map, map_50, train/loss"
        yield ConfigIssue(key, problem)
    metrics = [n for n, node in plain["metric"][stage].items() if node]
    columns = [c for c in _loss_columns(plain) if not _is_scheduled_weight(plain, c)]
    target = plain["task"].get("_target_")
    taught = DISTILL_COLUMNS if target == DISTILL_TASK and stage == "train" else ()
    measured = ["loss", *columns, *taught, *metrics]
    if target in SUPERVISED_TASKS and name not in measured:
        yield ConfigIssue(
            key,
            f"={metric!r} is not measured in {stage}; it has: {join_choices(measured)}"
            f"{did_you_mean(name, measured)}",
        )


def _loss_columns(plain: dict[str, Any]) -> set[str]:
    """Table columns of loss terms and their weights; empty if the total is the only column."""
    terms = {name: node for name, node in plain["loss"].items() if node}
    weights = [node.get("weight", 1) for node in terms.values()]
    if len(terms) < 2 and all(weight == 1 for weight in weights):
        return set()
    variable = [n for n, weight in zip(terms, weights, strict=True) if isinstance(weight, dict)]
    return {*terms, *(f"{name}_weight" for name in variable)}


def _is_scheduled_weight(plain: dict[str, Any], column: str) -> bool:
    """Return whether a column is a scheduled weight, which only changes in training."""
    term = plain["loss"].get(column.removesuffix("_weight")) or {}
    weight = term.get("weight") if column.endswith("_weight") else None
    return isinstance(weight, dict) and str(weight.get("_target_")).endswith(".ScheduledWeight")


def _teacher_issues(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    teacher, target = plain["teacher"], plain["task"].get("_target_")
    if plain["mode"] in CKPT_MODES:  # which need the trained model only
        return
    if target == DISTILL_TASK and teacher is None:
        yield ConfigIssue(
            "teacher", " has no value: task=distill needs a run folder or a checkpoint file"
        )
    if teacher is not None and target != DISTILL_TASK and str(target).startswith("app."):
        yield ConfigIssue("teacher", f"={teacher!r} is not used by {target}; allowed: task=distill")


def _resume_issues(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    resume, mode = plain["resume"], plain["mode"]
    if resume is not None and mode != "train":
        yield ConfigIssue("resume", f"={resume!r} is not used in mode={mode}; allowed: mode=train")
    if plain["trainer"]["requeue"] and resume is None and mode == "train":
        problem = "=True would restart the requeued job from the beginning; set resume=auto as well"
        yield ConfigIssue("trainer.requeue", problem)


def _length_issues(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    if plain["trainer"]["max_epochs"] is None and plain["trainer"]["max_steps"] is None:
        yield ConfigIssue("trainer.max_epochs", "=None and trainer.max_steps=None: one must be set")
    low, high = plain["trainer"]["min_epochs"], plain["trainer"]["max_epochs"]
    if high is not None and low > high:
        yield ConfigIssue("trainer.min_epochs", f"={low} is above trainer.max_epochs={high}")


def _time_issues(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    value = plain["trainer"]["max_time"]
    if isinstance(value, str) and parse_duration(value) is None:
        allowed = "allowed: seconds, HH:MM:SS or DD:HH:MM:SS"
        yield ConfigIssue("trainer.max_time", f"={value!r} is not a duration; {allowed}")


def parse_duration(duration: str | float | None) -> float | None:
    """Convert `HH:MM:SS` or `DD:HH:MM:SS` to seconds; return None if it is not a duration."""
    if not isinstance(duration, str):
        return duration
    match = re.fullmatch(r"(?:(\d+):)?(\d+):([0-5]?\d):([0-5]?\d)", duration)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return (((days * 24 + hours) * 60 + minutes) * 60 + seconds) or None


def _compile_issues(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    compile, blocks = plain["trainer"]["compile"], plain["trainer"]["gradient_checkpointing"]
    if compile and blocks:
        problem = f"={compile!r} and trainer.gradient_checkpointing are both set"
        yield ConfigIssue("trainer.compile", f"{problem}; allowed: one of them")


def _graph_issues(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    """Check for options that read the device in each step, or change what was recorded."""
    trainer, key = plain["trainer"], "trainer.cuda_graph"
    if not trainer["cuda_graph"]:
        return
    precision, compile = trainer["precision"], trainer["compile"]
    mode = compile.get("mode") if isinstance(compile, dict) else compile
    schedules = [name for name, node in plain["loss"].items() if _has_scheduled_weight(node)]
    obstacles = {
        "trainer.accumulate_grad_batches": (trainer["accumulate_grad_batches"] != 1, "1"),
        "trainer.devices": (trainer["devices"] not in (None, 1), "null, 1"),
        "trainer.on_nonfinite": (trainer["on_nonfinite"] == "skip", "stop, raise"),
        "trainer.gradient_checkpointing": (bool(trainer["gradient_checkpointing"]), "false"),
        "trainer.precision": (
            PRECISION_ALIASES.get(str(precision), precision) == "fp16",
            "auto, fp32, bf16, bf16-true",
        ),
        "trainer.compile": (isinstance(mode, str) and mode in GRAPH_MODES, "false, true"),
        "average": (plain["average"] is not None, "null"),
        **{f"loss.{name}.weight": (True, "a number") for name in schedules},
    }
    target = str(plain["optimizer"].get("_target_")).removeprefix("torch.optim.")
    if target not in FUSED_OPTIMIZERS:
        problem = f"=True needs one fused optimizer; allowed: {join_choices(FUSED_OPTIMIZERS)}"
        yield ConfigIssue(key, problem)
    for other, (is_obstacle, allowed) in obstacles.items():
        if is_obstacle:
            value = "" if other.startswith(("loss", "average")) else f"={_at(plain, other)!r}"
            problem = f"=True cannot be combined with {other}{value}; allowed: {other}={allowed}"
            yield ConfigIssue(key, problem)


def _at(plain: dict[str, Any], key: str) -> Any:
    group, name = key.split(".")
    return plain[group][name]


def _has_scheduled_weight(node: Any) -> bool:
    weight = node.get("weight") if isinstance(node, dict) else None
    return isinstance(weight, dict) and str(weight.get("_target_")).endswith(".ScheduledWeight")


def _device_issues(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    trainer, data = plain["trainer"], plain["data"]
    devices, key = trainer["devices"], "trainer.devices"
    if isinstance(devices, list) and (not devices or len({*devices}) < len(devices)):
        yield ConfigIssue(key, f"={devices!r}; allowed: a list of device ids without repetition")
    count = len(devices) if isinstance(devices, list) else devices
    for name in ("batch_size", "eval_batch_size"):
        size = data[name]
        if isinstance(count, int) and size is not None and size < count:
            problem = f"={size} is the total of all devices; it must be at least {count} for {key}"
            yield ConfigIssue(f"data.{name}", problem)
    if (
        trainer["batch_size_finder"]
        and plain["mode"] == "train"
        and (count or 1) not in (1, "auto")
    ):
        problem = f"=True searches on one device, but {key}={devices!r}; allowed: 1, null"
        yield ConfigIssue("trainer.batch_size_finder", problem)
    if trainer["strategy"] == "fsdp":
        yield from _fsdp_issues(plain)


def _fsdp_issues(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    """Check for options that need unsharded weights, or different model calls on each rank."""
    unsupported = "is not supported with trainer.strategy='fsdp'; allowed:"
    if plain["trainer"]["channels_last"] is True:
        problem = f"=True {unsupported} trainer.strategy=ddp, auto, false"
        yield ConfigIssue("trainer.channels_last", problem)
    if plain["task"].get("patches"):
        yield ConfigIssue("task.patches", f" {unsupported} trainer.strategy=ddp")
    for name, node in plain["callbacks"].items():
        for option in ("graph", "histograms_every_n_epochs"):
            if isinstance(node, dict) and node.get(option):
                problem = f"={node[option]!r} {unsupported} trainer.strategy=ddp"
                yield ConfigIssue(f"callbacks.{name}.{option}", problem)
    precision = plain["trainer"]["precision"]
    if PRECISION_ALIASES.get(str(precision), precision) == "fp16":
        yield ConfigIssue("trainer.precision", f"={precision!r} {unsupported} auto, fp32, bf16")


def _name_issues(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    if not re.fullmatch(r"[\w.+=,-]+", plain["name"]):
        problem = f"={plain['name']!r} is part of a folder name; allowed: letters, digits, _.+=,-"
        yield ConfigIssue("name", problem)
    nodes_by_key = {f"metric.{stage}": plain["metric"][stage] for stage in STAGES}
    for key, nodes in (nodes_by_key | {"loss": plain["loss"]}).items():
        for name in nodes:
            if not re.fullmatch(r"\w[\w.+=,@-]*", str(name)):
                problem = " names a column and a file; allowed: letters, digits, _.+=,@-"
                yield ConfigIssue(f"{key}.{name}", problem)
    for stage in STAGES:
        for name in plain["metric"][stage].keys() & set(RESERVED_COLUMNS):
            yield ConfigIssue(f"metric.{stage}.{name}", " is the name of another column; rename it")
    terms = {name for name, node in plain["loss"].items() if node}
    for name in terms & set(RESERVED_COLUMNS):
        yield ConfigIssue(f"loss.{name}", " is the name of another column; rename it")
    for stage in STAGES:
        for name in _loss_columns(plain) & plain["metric"][stage].keys():
            yield ConfigIssue(f"metric.{stage}.{name}", " is the column of a loss term; rename it")
    if plain["task"].get("_target_") in SUPERVISED_TASKS and not any(plain["loss"].values()):
        yield ConfigIssue("loss", " has no terms; choose one, for example loss=cross_entropy")


def _tuner_issues(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    low, high = plain["find"]["lr_from"], plain["find"]["lr_to"]
    if low >= high:
        yield ConfigIssue("find.lr_from", f"={low} must be below find.lr_to={high}")


def _export_issues(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    format = plain["export"]["format"]
    is_detector = plain["task"].get("_target_") == DETECTION_TASK
    if plain["mode"] == "export" and is_detector and format != "safetensors":
        problem = f"={format!r}: the number of boxes depends on the image, which cannot be traced"
        yield ConfigIssue("export.format", f"{problem}; allowed: safetensors")


def _scheduler_issues(plain: dict[str, Any]) -> Iterator[ConfigIssue]:
    node = plain["scheduler"]["lr_scheduler"] or {}
    per_step = plain["scheduler"]["interval"] == "step"
    if per_step and str(node.get("_target_")).endswith(".ReduceLROnPlateau"):
        problem = "='step': ReduceLROnPlateau steps once per epoch; allowed: epoch"
        yield ConfigIssue("scheduler.interval", problem)
