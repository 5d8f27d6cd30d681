"""What a saved configuration would import, before any of it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from app.config.build import TARGET
from app.config.targets import is_allowed
from app.runtime.errors import UserError


def refuse_strangers(source: str, config: dict[str, Any], trusted: Sequence[str]) -> None:
    """A saved configuration imports what the program offers, and what its user trusts by name.

    Args:
        source: The checkpoint or folder that it is from.
        config: Resolved; each place counts, whether something is built of it or not.
        trusted: Modules that the user named himself.

    Raises:
        UserError: All that it would import beside that.
    """
    found = {
        (key, str(name)) for key, name in _targets("", config) if not is_allowed(name, trusted)
    }
    if not found:
        return
    lines = [f"  {key}={name!r}" for key, name in sorted(found)]
    modules = sorted({name.rpartition(".")[0] or name for _, name in found})
    raise UserError(
        "\n".join(
            [
                f"{source} names code from outside this program; nothing of it was imported:",
                *lines,
                f"if you trust that code: trusted_targets=[{','.join(modules)}]",
            ]
        )
    )


def _targets(key: str, node: Any) -> Iterator[tuple[str, Any]]:
    left = [(key, node)]
    while left:
        key, node = left.pop()
        if isinstance(node, list):
            left += [(f"{key}.{index}", part) for index, part in enumerate(node)]
        elif isinstance(node, dict):
            left += [(f"{key}.{name}" if key else str(name), part) for name, part in node.items()]
            if TARGET in node and node[TARGET] is not None:
                yield (f"{key}.{TARGET}" if key else TARGET), node[TARGET]
