"""The template of a saved run, made harmless before it is interpolated anew."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from app.config.limits import DEPTH, load_yaml
from app.config.secrets import KEPT
from app.runtime.errors import UserError

# These give what they are given; others, as `oc.env`, look around on this machine.
CALL = re.compile(r"\$\{\s*(?:or|path|image_part)\s*:")
REFERENCE = re.compile(r"\$\{\s*([\w.@/\[\]-]+)\s*\}")
LINK = 4  # what an interpolation adds to the depth, since OmegaConf follows it that deep
VALUES = 25_000  # that it comes to when it is interpolated
COST = 10  # of an interpolation, in values
Place = tuple[Any, ...]  # the keys that lead to a value


def safe_template(text: object, saved: dict[str, Any], source: str) -> DictConfig:
    """The configuration with its interpolations.

    Those that call anything but the program's own plain functions are replaced by what they came
    to when the run was trained: the environment of today is not read for others.

    Args:
        text: Its YAML.
        saved: The same configuration, resolved.
        source: The file that both are from, for errors.

    Raises:
        UserError: It is no YAML, or grows without end when it is interpolated.
    """
    raw = load_yaml(text, f"{source}: its template", VALUES)
    if not isinstance(raw, dict):
        raise UserError(f"{source}: its template is a {type(raw).__name__}, not a configuration")
    kept = _kept(raw, saved)
    _Growth(kept, source).check()
    try:
        template = OmegaConf.create(kept)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{source}: its template is no configuration: {reason}") from error
    assert isinstance(template, DictConfig)
    return template


def _kept(node: Any, saved: Any) -> Any:
    if isinstance(node, dict):
        return {key: _kept(part, _part(saved, str(key))) for key, part in node.items()}
    if isinstance(node, list):
        return [_kept(part, _part(saved, str(index))) for index, part in enumerate(node)]
    if isinstance(node, str) and "${" in REFERENCE.sub("", CALL.sub("", node)):
        return saved if isinstance(saved, (int, float)) else _escaped(saved)
    return node


def _escaped(saved: Any) -> str | None:
    """A saved value is a value, whatever it looks like; the name of a secret stays one."""
    if isinstance(saved, str) and KEPT.fullmatch(saved):
        return f"\\{saved}"
    return saved.replace("${", "") if isinstance(saved, str) else None


def _part(node: Any, key: str) -> Any:
    if isinstance(node, dict):
        return node.get(key)
    try:
        return node[int(key)] if isinstance(node, list) else None
    except (ValueError, IndexError):
        return None


class _Growth:
    """What a template comes to, found without interpolating it."""

    def __init__(self, root: dict[str, Any], source: str) -> None:
        self.root, self.source = root, source
        self.known: dict[Place, tuple[int, int]] = {}
        self.open: set[Place] = set()

    def check(self) -> None:
        """Raises a `UserError` where it is more than any configuration."""
        self.measured((), self.root)

    def measured(self, place: Place, node: Any) -> tuple[int, int]:
        """(values, depth) of a value with all it refers to."""
        if place in self.open or len(self.open) > 2 * DEPTH:
            raise UserError(f"{self.source}: its template refers to itself over and over")
        if place not in self.known:
            self.open.add(place)
            self.known[place] = self._summed(place, node)
            self.open.remove(place)
        return self.known[place]

    def _summed(self, place: Place, node: Any) -> tuple[int, int]:
        size, deeper = 1, 1
        if isinstance(node, str):
            parts = [self.measured(*self._found(place, name)) for name in REFERENCE.findall(node)]
            count = node.count("${")
            size, deeper = 1 + len(node) // 64 + COST * count, LINK if count else 1
        else:
            parts = [self.measured((*place, key), part) for key, part in _children(node)]
        size += sum(inner for inner, _ in parts)
        depth = deeper + max((inner for _, inner in parts), default=0)
        if size > VALUES or depth > DEPTH:
            raise UserError(f"{self.source}: its template grows too large when interpolated")
        return size, depth

    def _found(self, place: Place, name: str) -> tuple[Place, Any]:
        inner = name.lstrip(".")
        up = len(name) - len(inner)
        above = place[: max(len(place) - up, 0)] if up else ()
        whole = (*above, *(key for key in re.split(r"[.\[\]]+", inner) if key))
        node: Any = self.root
        for length, key in enumerate(whole):
            if isinstance(node, str):  # stands for another; the whole of that counts
                return whole[:length], node
            node = _part(node, key)
        return whole, node


def _children(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, list):
        yield from ((str(index), part) for index, part in enumerate(node))
