"""Load the template of a saved run, and make it safe to interpolate again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from app.config.limits import MAX_NESTING, load_yaml
from app.config.secrets import SECRET_REFERENCE
from app.runtime.errors import UserError

# These resolvers only use their arguments; others, such as `oc.env`, read from this machine.
HARMLESS_CALL = re.compile(r"\$\{\s*(?:or|path|image_part)\s*:")
REFERENCE = re.compile(r"\$\{\s*([\w.@/\[\]-]+)\s*\}")
INTERPOLATION_DEPTH = 4  # levels of recursion that OmegaConf needs for an interpolation
INTERPOLATION_COST = 10  # of an interpolation, counted in values
MAX_TEMPLATE_VALUES = 25_000  # after interpolation
KeyPath = tuple[Any, ...]


def safe_template(text: object, saved: dict[str, Any], source: str) -> DictConfig:
    """Load a saved configuration with its interpolations.

    Interpolations that call anything except the program's own pure functions are replaced by the
    values that they had when the run was trained, so that a file from someone else cannot read
    today's environment.

    Args:
        text: YAML of the template.
        saved: The same configuration, resolved.
        source: File that contains both, for errors.

    Raises:
        UserError: The text is not YAML, or expands without bound when it is interpolated.
    """
    raw = load_yaml(text, f"{source}: the saved template", MAX_TEMPLATE_VALUES)
    if not isinstance(raw, dict):
        raise UserError(
            f"{source}: the saved template is a {type(raw).__name__}, not a configuration"
        )
    safe = _replace_calls(raw, saved)
    _SizeCheck(safe, source).check()
    try:
        template = OmegaConf.create(safe)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{source}: the saved template is not a configuration: {reason}") from error
    assert isinstance(template, DictConfig)
    return template


def _replace_calls(node: Any, saved: Any) -> Any:
    if isinstance(node, dict):
        return {key: _replace_calls(child, _child(saved, str(key))) for key, child in node.items()}
    if isinstance(node, list):
        return [_replace_calls(child, _child(saved, str(i))) for i, child in enumerate(node)]
    if isinstance(node, str) and "${" in REFERENCE.sub("", HARMLESS_CALL.sub("", node)):
        return saved if isinstance(saved, (int, float)) else _escape(saved)
    return node


def _escape(saved: Any) -> str | None:
    """Escape a saved value so that it is not interpolated; references to secrets stay as text."""
    if isinstance(saved, str) and SECRET_REFERENCE.fullmatch(saved):
        return f"\\{saved}"
    return saved.replace("${", "") if isinstance(saved, str) else None


def _child(node: Any, key: str) -> Any:
    if isinstance(node, dict):
        return node.get(key)
    try:
        return node[int(key)] if isinstance(node, list) else None
    except (ValueError, IndexError):
        return None


class _SizeCheck:
    """Computes the size of an interpolated template without interpolating it."""

    def __init__(self, root: dict[str, Any], source: str) -> None:
        self.root, self.source = root, source
        self.sizes: dict[KeyPath, tuple[int, int]] = {}
        self.active: set[KeyPath] = set()

    def check(self) -> None:
        """Raise a `UserError` if the template is larger than any configuration."""
        self._measure((), self.root)

    def _measure(self, path: KeyPath, node: Any) -> tuple[int, int]:
        """Return the number of values and the depth of a node, including what it refers to."""
        if path in self.active or len(self.active) > 2 * MAX_NESTING:
            raise UserError(f"{self.source}: the saved template refers to itself")
        if path not in self.sizes:
            self.active.add(path)
            self.sizes[path] = self._measure_children(path, node)
            self.active.remove(path)
        return self.sizes[path]

    def _measure_children(self, path: KeyPath, node: Any) -> tuple[int, int]:
        size, own_depth = 1, 1
        if isinstance(node, str):
            children = [self._measure(*self._find(path, key)) for key in REFERENCE.findall(node)]
            count = node.count("${")
            size = 1 + len(node) // 64 + INTERPOLATION_COST * count
            own_depth = INTERPOLATION_DEPTH if count else 1
        else:
            children = [self._measure((*path, key), child) for key, child in _items(node)]
        size += sum(child_size for child_size, _ in children)
        depth = own_depth + max((child_depth for _, child_depth in children), default=0)
        if size > MAX_TEMPLATE_VALUES or depth > MAX_NESTING:
            raise UserError(f"{self.source}: the saved template grows too large when interpolated")
        return size, depth

    def _find(self, path: KeyPath, reference: str) -> tuple[KeyPath, Any]:
        key = reference.lstrip(".")
        dots = len(reference) - len(key)
        parent = path[: max(len(path) - dots, 0)] if dots else ()
        target = (*parent, *(name for name in re.split(r"[.\[\]]+", key) if name))
        node: Any = self.root
        for length, name in enumerate(target):
            if isinstance(node, str):  # an interpolation; everything that it refers to counts
                return target[:length], node
            node = _child(node, name)
        return target, node


def _items(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, list):
        yield from ((str(index), child) for index, child in enumerate(node))
