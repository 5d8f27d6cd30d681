"""One look at the whole configuration before anything starts: all mistakes at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from app.config.build import Build, node_mistakes
from app.config.errors import ConfigError, Mistake, UserError, nearest, one_of
from app.config.schema import Config
from app.config.typed import UNKNOWN, mistakes_of, structured

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
)
SUPERVISED = "app.task.SupervisedTask"  # whose columns are known from the configuration alone
OFFERS = {  # what the program gives to a part that has a parameter of that name
    "callbacks": ("folder", "model", "config"),
    "task": ("model", "loss", "metrics", "precision"),
    "average": ("model",),
}
USES_CKPT = ("test", "valid", "predict", "export")  # modes that use what was trained
AUTO = "auto"  # in a scheduler's arguments: as many steps or epochs as the run has


def checked(plain: dict[str, Any], trusted: Sequence[str], found: Sequence[Mistake] = ()) -> Config:
    """The configuration, typed.

    Args:
        plain: Resolved, as `freeze` gives it.
        trusted: Modules outside this program that the user named himself.
        found: Mistakes known already.

    Raises:
        ConfigError: Everything that is wrong with it.
    """
    mistakes = [*found, *mistakes_of("", plain, Config)]
    mistakes += _rule_mistakes(plain, tuple(mistake.key for mistake in mistakes))
    mistakes += _target_mistakes(plain, trusted)
    wrong = {mistake.key for mistake in mistakes}
    mistakes += _trial_mistakes(plain, trusted, wrong)
    if mistakes:
        raise ConfigError(mistakes)
    return structured(plain, Config)


def fill_auto(node: Any, number: int) -> Any:
    """The node with every argument that is `auto`, at any depth, set to the number."""
    if isinstance(node, dict):
        return {key: fill_auto(value, number) for key, value in node.items()}
    return number if node == AUTO else node


def has_auto(node: Any) -> bool:
    """Whether an argument is `auto`."""
    return bool(fill_auto(node, 0) != node)


def _named_nodes(plain: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], int]]:
    """(key, node, first arguments that the program adds) of every part."""
    scheduler, data = _group(plain, "scheduler"), _group(plain, "data")
    single = {key: plain.get(key) for key in ("model", "task", "average")}
    single["scheduler.lr_scheduler"] = fill_auto(scheduler.get("lr_scheduler"), 100)
    single["data.sampling"] = data.get("sampling")
    optimizers = optimizer_nodes(plain.get("optimizer"))
    given = {"scheduler.lr_scheduler": 1} | dict.fromkeys(optimizers, 1)
    groups = {
        "loss": plain.get("loss"),
        "callbacks": plain.get("callbacks"),
        "data.source": data.get("source"),
        "data.augment": data.get("augment"),
        **{f"metric.{stage}": _group(plain, "metric").get(stage) for stage in STAGES},
    }
    named = {
        f"{key}.{name}": node
        for key, nodes in groups.items()
        if isinstance(nodes, dict)
        for name, node in nodes.items()
    }
    for key, node in (single | optimizers | named).items():
        if isinstance(node, dict):
            yield key, node, given.get(key, 0)


def optimizer_nodes(node: Any) -> dict[str, Any]:
    """By key each optimizer: `optimizer` itself, or `optimizer.<part of the model>`."""
    if not isinstance(node, dict) or "_target_" in node:
        return {"optimizer": node}
    return {f"optimizer.{name}": part for name, part in node.items() if part is not None}


def _group(plain: dict[str, Any], name: str) -> dict[str, Any]:
    value = plain.get(name)
    return value if isinstance(value, dict) else {}


def _target_mistakes(plain: dict[str, Any], trusted: Sequence[str]) -> Iterator[Mistake]:
    for key, node, given in _named_nodes(plain):
        if "_target_" not in node:
            yield Mistake(f"{key}._target_", " is missing: the class or function to use")
        offers = OFFERS.get(key.partition(".")[0], ())
        yield from node_mistakes(key, node, trusted, given, offers)


def _trial_mistakes(
    plain: dict[str, Any], trusted: Sequence[str], wrong: set[str]
) -> Iterator[Mistake]:
    """The small parts are built once for trial, so that their own checks speak now."""
    parts = {key: node for key, node, _ in _named_nodes(plain)}
    sound = {
        key: node
        for key, node in parts.items()
        if not any(bad.startswith(key) for bad in wrong) and UNKNOWN not in node.values()
    }
    build = Build(trusted)
    for key in sound:
        if key.startswith(("metric.", "loss.", "data.augment.")):
            strict = {"validate_args": True} if "validate_args" in sound[key] else {}
            _, refusals = _tried(build, key, sound[key] | strict)
            yield from refusals
    if "average" in sound:
        import torch

        _, refusals = _tried(build, "average", sound["average"], torch.nn.Linear(1, 1))
        yield from refusals
    for key in sound:
        if key == "optimizer" or key.startswith("optimizer."):
            import torch

            parameters = [torch.nn.Parameter(torch.zeros(1))]
            optimizer, refusals = _tried(build, key, sound[key], parameters)
            yield from refusals
            scheduler = "scheduler.lr_scheduler"
            if scheduler in sound and not refusals:
                _, refusals = _tried(build, scheduler, sound[scheduler], optimizer)
                yield from refusals


def _tried(build: Build, key: str, node: Any, *given: Any) -> tuple[Any, list[Mistake]]:
    try:
        return build(key, node, *given), []
    except UserError as error:
        return None, [Mistake("", str(error))]


def _rule_mistakes(plain: dict[str, Any], broken: tuple[str, ...]) -> Iterator[Mistake]:
    """What no single key can tell; a rule is left out where a key that it reads is broken."""
    data = ("data.source", "data.split", "trainer.overfit_batches")
    rules = {
        _mode_mistakes: ("mode", "ckpt"),
        _stage_mistakes: ("mode", "predict", *data),
        _input_mistakes: ("data.inputs", "data.normalize"),
        _monitor_mistakes: ("goal", "checkpoint", "task", "metric", "loss", *data),
        _length_mistakes: ("trainer.max_epochs", "trainer.max_steps"),
        _name_mistakes: ("name", "metric", "loss", "task"),
        _find_mistakes: ("mode", "find"),
    }
    for rule, keys in rules.items():
        if not any(bad.startswith(key) or key.startswith(bad) for bad in broken for key in keys):
            yield from rule(plain)


def _length_mistakes(plain: dict[str, Any]) -> Iterator[Mistake]:
    if plain["trainer"]["max_epochs"] is None and plain["trainer"]["max_steps"] is None:
        yield Mistake("trainer.max_epochs", "=None and trainer.max_steps=None: one must be given")


def _name_mistakes(plain: dict[str, Any]) -> Iterator[Mistake]:
    if not re.fullmatch(r"[\w.+=,-]+", plain["name"]):
        yield Mistake("name", f"={plain['name']!r} names a folder: letters, digits and _.+=,- only")
    for stage in STAGES:
        for name in plain["metric"][stage].keys() & set(RESERVED):
            yield Mistake(f"metric.{stage}.{name}", " is the name of another column; rename it")
    terms = {name for name, node in plain["loss"].items() if node}
    for name in terms & set(RESERVED) - {"loss"}:
        yield Mistake(f"loss.{name}", " is the name of another column; rename it")
    for stage in STAGES:
        for name in _term_columns(plain) & plain["metric"][stage].keys():
            yield Mistake(f"metric.{stage}.{name}", " is the column of a loss term; rename it")
    if plain["task"].get("_target_") == SUPERVISED and not any(plain["loss"].values()):
        yield Mistake("loss", " has no term; choose one, as loss=cross_entropy")


def _term_columns(plain: dict[str, Any]) -> set[str]:
    """What the loss adds to the tables beside the total: nothing where that is its only term."""
    terms = {name: node for name, node in plain["loss"].items() if node}
    weights = [node.get("weight", 1) for node in terms.values()]
    if len(terms) < 2 and all(weight == 1 for weight in weights):
        return set()
    changing = [n for n, w in zip(terms, weights, strict=True) if isinstance(w, dict)]
    return {*terms, *(f"{name}_weight" for name in changing)}


def _mode_mistakes(plain: dict[str, Any]) -> Iterator[Mistake]:
    mode, ckpt = plain["mode"], plain["ckpt"]
    if mode in USES_CKPT and ckpt is None:
        yield Mistake("ckpt", f" has no value: mode={mode} needs a run folder or a checkpoint file")
    if mode not in (*USES_CKPT, "check") and ckpt is not None:
        allowed = ", ".join(f"mode={other}" for other in USES_CKPT)
        yield Mistake("ckpt", f"={ckpt!r} has no use in mode={mode}; allowed: {allowed}")
    if ckpt is not None and not Path(ckpt).exists():
        yield Mistake("ckpt", f"={ckpt!r} does not exist")


def stages_with_data(plain: dict[str, Any]) -> set[str]:
    """The stages that have a source of their own or are cut from the training data."""
    source, split = plain["data"]["source"], plain["data"]["split"]
    overfit = plain["trainer"]["overfit_batches"] > 0
    return {
        stage
        for stage in STAGES
        if source[stage] is not None or split.get(stage) or (overfit and stage == "valid")
    }


def _stage_mistakes(plain: dict[str, Any]) -> Iterator[Mistake]:
    source, split = plain["data"]["source"], plain["data"]["split"]
    for stage in ("valid", "test"):
        if source[stage] is not None and split[stage] is not None:
            yield Mistake(
                f"data.split.{stage}",
                f"={split[stage]!r} and data.source.{stage} are both given; allowed: one of them",
            )
    needed = _stage_of(plain)
    if needed is not None and needed not in stages_with_data(plain):
        cut = "" if needed == "train" else f" or data.split.{needed}"
        key = "predict.stage" if plain["mode"] == "predict" else "mode"
        value = needed if plain["mode"] == "predict" else plain["mode"]
        yield Mistake(key, f"={value!r} has no data: give data.source.{needed}{cut}")


def _stage_of(plain: dict[str, Any]) -> str | None:
    """The stage that must have data; None where none must."""
    mode = plain["mode"]
    if mode in ("find_lr", "find_batch_size"):
        return "train"
    if mode == "predict":
        return None if plain["predict"]["images"] else str(plain["predict"]["stage"])
    return mode if mode in STAGES else None


def _input_mistakes(plain: dict[str, Any]) -> Iterator[Mistake]:
    inputs, normalize = plain["data"]["inputs"], plain["data"]["normalize"]
    if inputs is None and normalize is not None:
        yield Mistake(
            "data.inputs", "=None: a whole batch cannot be normalised; data.normalize=null"
        )


def _find_mistakes(plain: dict[str, Any]) -> Iterator[Mistake]:
    low, high = plain["find"]["lr_from"], plain["find"]["lr_to"]
    if low >= high:
        yield Mistake("find.lr_from", f"={low} must be below find.lr_to={high}")


def _monitor_mistakes(plain: dict[str, Any]) -> Iterator[Mistake]:
    """The goal, and the further monitors, are measured."""
    yield from _measured_mistakes(plain, "goal.metric", plain["goal"]["metric"])
    for name, monitor in plain["checkpoint"]["monitors"].items():
        if monitor is not None:
            key = f"checkpoint.monitors.{name}"
            if not re.fullmatch(r"[\w.+=,-]+", name):
                yield Mistake(key, " names a file: letters, digits and _.+=,- only")
            yield from _measured_mistakes(plain, f"{key}.metric", monitor["metric"])


def _measured_mistakes(plain: dict[str, Any], key: str, metric: str) -> Iterator[Mistake]:
    stage, name = metric.split("/", 1) if "/" in metric else ("valid", metric)
    if stage not in ("train", "valid"):
        yield Mistake(key, f"={metric!r}: {stage!r} is no stage of training: train, valid")
        return
    if stage not in stages_with_data(plain):
        yield Mistake(
            key,
            f"={metric!r} has no data to be measured on: give data.source.{stage} or "
            f"data.split.{stage}, or choose train/loss",
        )
        return
    metrics = [n for n, node in plain["metric"][stage].items() if node]
    measured = ["loss", *_term_columns(plain), *metrics]
    if plain["task"].get("_target_") == SUPERVISED and name not in measured:
        yield Mistake(
            key,
            f"={metric!r} is not measured in {stage}; it has: {one_of(measured)}"
            f"{nearest(name, measured)}",
        )
