"""The folder of a sweep."""

from __future__ import annotations

from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.types import RunMode

from app.sweep.folder import SweepFolder


def test_frozen_loader_after_edit_reads_original_files(tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    conf.mkdir()
    (conf / "config.yaml").write_text("a: 1\n")
    search_path = ConfigSearchPathImpl()
    search_path.append("hydra", "pkg://hydra.conf")
    search_path.append("main", f"file://{conf}")
    search_path.append("schema", "structured://")
    loader = ConfigLoaderImpl(search_path)
    folder = SweepFolder(tmp_path / "sweep")
    folder.freeze(loader)
    (conf / "config.yaml").write_text("a: 2\n")
    frozen = folder.frozen_loader(loader)
    assert frozen.load_configuration("config", [], RunMode.RUN).a == 1
    assert loader.load_configuration("config", [], RunMode.RUN).a == 2
