"""Hydra's sources of YAML files with limits on what is read and on what is imported."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins import file_config_source, importlib_resources_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf import Container, OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from app.config.allowlist import TRUSTED_TARGETS_VARIABLE, is_trusted, trusted_from_environment
from app.config.limits import MAX_FILE_BYTES, yaml_problem
from app.runtime.errors import ConfigError, ConfigIssue
from app.runtime.small_files import read_small_file

HEADER_LENGTH = 512  # characters in which Hydra looks for `# @package`
TRUSTED_PACKAGES = ("hydra.conf", "hydra_plugins")


@contextmanager
def strict_sources() -> Iterator[None]:
    """Read `file://` and `pkg://` configurations with limits while the context is open.

    Only the entry points of this program open it, so other Hydra programs in the same environment,
    or in the same notebook, keep Hydra's own sources.
    """
    Plugins.instance()  # registers Hydra's own sources, once in a process
    types = SourcesRegistry.instance().types
    replaced = dict(types)
    strict = (FileConfigSource, ImportlibResourcesConfigSource)
    types |= {source.scheme(): source for source in strict}
    try:
        yield
    finally:
        SourcesRegistry.instance().types = replaced


class RefusedSourceError(ConfigError, HydraException):
    """A configuration source that is not read; Hydra prints it in one line, too."""


class FileConfigSource(file_config_source.FileConfigSource):
    """A folder of YAML files, each checked before it becomes a configuration."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Load a file as Hydra does, unless it is not YAML, too large or too deeply nested."""
        path = Path(self.path) / self._normalize_file_name(config_path)
        try:
            target = path.resolve()  # links may lead anywhere
            text = read_small_file(target.parent, target.name, MAX_FILE_BYTES)
            if text is None:
                return super().load_config(config_path)  # raises Hydra's own error
            config = copy.deepcopy(_parse(text))
        except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError) as error:
            problem = " ".join(str(error).split())
            issue = ConfigIssue(str(path), f" cannot be read: {problem}")
            raise RefusedSourceError([issue]) from error
        header = self._get_header_dict(text[:HEADER_LENGTH])
        return ConfigResult(self.provider, self.full_path(), config, header)


@lru_cache(maxsize=256)
def _parse(text: str) -> Container:
    """Return the configuration in a YAML file; jobs of a sweep read the same files again.

    Raises:
        ValueError: It is too large, too deeply nested, or neither a group nor a list.
        yaml.YAMLError: It is not valid YAML.
    """
    if problem := yaml_problem(text):
        raise ValueError(problem)
    content = yaml.load(text, Loader=_yaml_loader())
    if content is not None and not isinstance(content, (dict, list, str)):
        raise ValueError(f"it contains a {type(content).__name__}")
    return OmegaConf.create({} if content is None else content)


@cache
def _yaml_loader() -> Any:
    """Return OmegaConf's loader of YAML, with libyaml's parser where it is installed."""
    loader = get_yaml_loader()
    return type("Loader", (yaml.CSafeLoader, loader), {}) if yaml.__with_libyaml__ else loader


class ImportlibResourcesConfigSource(  # Hydra compares the names of sources of one scheme
    importlib_resources_config_source.ImportlibResourcesConfigSource
):
    """A package of YAML files; only trusted ones, because the package is imported.

    Args:
        provider: What asks for the source.
        path: `pkg://` and the name of the package.
    """

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        if not is_trusted(self.path, [*TRUSTED_PACKAGES, *trusted_from_environment()]):
            problem = (
                f"={path!r} would import a package; allowed: folders, or packages named in the "
                f"environment variable {TRUSTED_TARGETS_VARIABLE}"
            )
            raise RefusedSourceError([ConfigIssue("hydra.searchpath", problem)])
