"""Puts `conf/` inside the package of a wheel; an editable install reads it in place."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ConfInside(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the configuration groups to a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"]["conf"] = "app/conf"
