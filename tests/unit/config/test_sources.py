"""Configuration files are read as Hydra and OmegaConf read them."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from app.config.sources import FileConfigSource
from app.runtime.errors import ConfigError

TEXT = """# @package _global_
x: [1e3, 1_000, 1:30, 2020-01-31, on, 0o17, .5, "${seed}", null, 'it''s']
shared: &shared {a: 1}
again: *shared
"""


def test_file_has_the_values_that_omegaconf_reads(tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text(TEXT)
    source = FileConfigSource("test", f"file://{tmp_path}")
    found = source.load_config("some")
    assert found.config == OmegaConf.load(tmp_path / "some.yaml")
    assert found.header == {"package": "_global_"}
    found.config.x[0] = 7
    assert source.load_config("some").config.x[0] == 1000.0
    (tmp_path / "some.yaml").write_text("x: [2]")
    assert source.load_config("some").config == {"x": [2]}


@pytest.mark.parametrize("text", ["a: 1\na: 2", "3", "- a\nb: 1"])
def test_file_that_is_no_configuration_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "some.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"some\.yaml cannot be read: ") as caught:
        FileConfigSource("test", f"file://{tmp_path}").load_config("some")
    (issue,) = caught.value.issues
    assert "\n" not in str(issue)
