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
RESERVED = ("epoch", "iter", "stage", "loss", "num_samples", "lr", "iter_time", "epoch_time")
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
    """The node with every argument that is `auto` set to the number."""
    return {k: number if v == AUTO else v for k, v in node.items()} if node else node


def _named_nodes(plain: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], int]]:
    """(key, node, first arguments that the program adds) of every part."""
    scheduler = _group(plain, "scheduler")
    single = {"model": plain.get("model"), "optimizer": plain.get("optimizer")}
    single["scheduler.lr_scheduler"] = fill_auto(scheduler.get("lr_scheduler"), 100)
    given = {"optimizer": 1, "scheduler.lr_scheduler": 1}
    groups = {
        "loss": plain.get("loss"),
        "callbacks": plain.get("callbacks"),
        "data.source": _group(plain, "data").get("source"),
        "data.augment": _group(plain, "data").get("augment"),
        **{f"metric.{stage}": _group(plain, "metric").get(stage) for stage in STAGES},
    }
    named = {
        f"{key}.{name}": node
        for key, nodes in groups.items()
        if isinstance(nodes, dict)
        for name, node in nodes.items()
    }
    for key, node in (single | named).items():
        if isinstance(node, dict):
            yield key, node, given.get(key, 0)


def _group(plain: dict[str, Any], name: str) -> dict[str, Any]:
    value = plain.get(name)
    return value if isinstance(value, dict) else {}


def _target_mistakes(plain: dict[str, Any], trusted: Sequence[str]) -> Iterator[Mistake]:
    for key, node, given in _named_nodes(plain):
        if "_target_" not in node:
            yield Mistake(f"{key}._target_", " is missing: the class or function to use")
        offers = ("folder",) if key.startswith("callbacks.") else ()
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
    if "optimizer" in sound:
        import torch

        parameters = [torch.nn.Parameter(torch.zeros(1))]
        optimizer, refusals = _tried(build, "optimizer", sound["optimizer"], parameters)
        yield from refusals
        key = "scheduler.lr_scheduler"
        if key in sound and not refusals:
            _, refusals = _tried(build, key, sound[key], optimizer)
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
        _stage_mistakes: ("mode", *data),
        _goal_mistakes: ("goal", "metric", "loss", *data),
        _length_mistakes: ("trainer.max_epochs", "trainer.max_steps"),
        _name_mistakes: ("name", "metric", "loss"),
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
    if not any(plain["loss"].values()):
        yield Mistake("loss", " has no term; choose one, as loss=cross_entropy")


def _mode_mistakes(plain: dict[str, Any]) -> Iterator[Mistake]:
    mode, ckpt = plain["mode"], plain["ckpt"]
    if mode in ("test", "valid") and ckpt is None:
        yield Mistake("ckpt", f" has no value: mode={mode} needs a run folder or a checkpoint file")
    if mode == "train" and ckpt is not None:
        yield Mistake("ckpt", f"={ckpt!r} has no use in mode=train; allowed: mode=test, mode=valid")
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
    if plain["mode"] != "check" and plain["mode"] not in stages_with_data(plain):
        cut = "" if plain["mode"] == "train" else f" or data.split.{plain['mode']}"
        yield Mistake(
            "mode", f"={plain['mode']!r} has no data: give data.source.{plain['mode']}{cut}"
        )


def _goal_mistakes(plain: dict[str, Any]) -> Iterator[Mistake]:
    metric = plain["goal"]["metric"]
    stage, name = metric.split("/", 1) if "/" in metric else ("valid", metric)
    if stage not in ("train", "valid"):
        yield Mistake(
            "goal.metric", f"={metric!r}: {stage!r} is no stage of training: train, valid"
        )
        return
    if stage not in stages_with_data(plain):
        yield Mistake(
            "goal.metric",
            f"={metric!r} has no data to be measured on: give data.source.{stage} or "
            f"data.split.{stage}, or choose train/loss",
        )
        return
    terms = [term for term, node in plain["loss"].items() if node]
    measured = ["loss", *(terms if len(terms) > 1 else []), *plain["metric"][stage]]
    if name not in measured:
        yield Mistake(
            "goal.metric",
            f"={metric!r} is not measured in {stage}; it has: {one_of(measured)}"
            f"{nearest(name, measured)}",
        )
