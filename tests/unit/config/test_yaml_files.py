"""YAML files that share most of their text."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from app.config.yaml_files import read_similar_yaml, read_yaml
from app.runtime.files import write_text

LONG = {
    f"key{number}": {"text": "word " * 40, "empty": "", "list": [1, [2]]} for number in range(9)
}
PLAIN = {
    "seed": 1,
    "tags": [],
    "hydra": {"runtime": LONG, "job": {"name": "a\n\nb\n"}},
    "last": None,
}
TEXTS = {
    "plain": yaml.safe_dump(PLAIN, sort_keys=False),
    "wide": yaml.safe_dump(PLAIN, sort_keys=False, width=20, default_flow_style=False),
    "block scalar": f"a:\n  b: |\n    {'x: y ' * 300}\n\n    z: 1\n  c: 2\n",
    "text below a key": f"a:\n  {'word ' * 300}\n  end\nb: 1\n",
    "alias to another section": "a: &a\n  b: 1\nc: *a\n",
    "quote over the margin": "a: 'b\nc: d'\ne: 1\n",
    "flow over the margin": "{a: 1,\nb: 2}\n",
    "key twice": "a: 1\nb: 2\na: 3\n",
    "quoted keys": "'a': 1\n? b\n: 2\nc: 3\n",
    "comments": "# one\na: 1\n# two\n\nb: # three\n  c: 2\n",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_read_similar_yaml_equals_read_yaml(kind: str, tmp_path: Path) -> None:
    write_text(tmp_path / "file", TEXTS[kind])
    assert read_similar_yaml(tmp_path, "file") == read_yaml(tmp_path, "file", dict)


def test_read_similar_yaml_changed_value_is_read(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_text(tmp_path / "file", yaml.safe_dump(PLAIN | {"seed": seed}, sort_keys=False))
        assert read_similar_yaml(tmp_path, "file") == PLAIN | {"seed": seed}
