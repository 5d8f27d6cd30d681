"""Folders and packages of YAML files, read with limits, in place of Hydra's own sources."""

from __future__ import annotations

from pathlib import Path

import yaml
from hydra._internal.core_plugins import file_config_source, importlib_resources_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf.errors import OmegaConfBaseException

from app.config.allowlist import TRUST_VARIABLE, is_trusted, trusted_by_environment
from app.config.limits import FILE, yaml_problem
from app.runtime.errors import ConfigError, ConfigIssue

PACKAGES = ("hydra.conf", "hydra_plugins")


class Refused(ConfigError, HydraException):  # noqa: N818
    """A source of configurations that is not read; Hydra, too, shows it in one line."""


class FileConfigSource(file_config_source.FileConfigSource):
    """A folder of YAML files, each looked over before it is made into values."""

    def load_config(self, config_path: str) -> ConfigResult:
        """As Hydra's, but for files that are no YAML, or too big, or too deep."""
        path = Path(self.path) / self._normalize_file_name(config_path)
        try:
            problem = _problem(path)
            found = None if problem else super().load_config(config_path)
        except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError) as error:
            problem = " ".join(str(error).split())
        if problem or found is None:
            raise Refused([ConfigIssue(str(path), f" cannot be read: {problem}")])
        return found


def _problem(path: Path) -> str | None:
    size = path.stat().st_size
    if size > FILE:
        return f"it has {size:,} bytes; allowed: {FILE:,}"
    return yaml_problem(path.read_text(encoding="utf-8"))


class ImportlibResourcesConfigSource(
    importlib_resources_config_source.ImportlibResourcesConfigSource
):
    """A package that holds YAML files; since it is imported for that, only known ones.

    Args:
        provider: Who asks for it.
        path: `pkg://` and its name.
    """

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        if not is_trusted(self.path, [*PACKAGES, *trusted_by_environment()]):
            problem = (
                f"={path!r} would import a package; allowed: folders, or name the package in the "
                f"variable {TRUST_VARIABLE}"
            )
            raise Refused([ConfigIssue("hydra.searchpath", problem)])


# A scheme keeps the class that came first, and Hydra imports all plugins before it registers any.
SourcesRegistry.instance().types |= {
    one.scheme(): one for one in (FileConfigSource, ImportlibResourcesConfigSource)
}
