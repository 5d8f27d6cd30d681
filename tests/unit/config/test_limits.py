"""Limits on what is resolved, whoever resolves it."""

from __future__ import annotations

import pytest
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_visitor import GrammarVisitor

from app.config import resolvers
from app.config.compose import open_composer
from app.config.limits import limited_interpolations, yaml_problem
from app.config.resolve import resolve
from app.runtime.errors import ConfigError

REPLACED = ("oc.env", "oc.decode")


def grow(line: str, first: str = "ha", levels: int = 14) -> dict[str, object]:
    """Return texts that each use the one before."""
    return {"x0": first} | {f"x{n}": line.replace("LAST", f"x{n - 1}") for n in range(1, levels)}


GROWING = {
    "text": grow("${LAST}" * 9),
    "decode": grow("${oc.decode:'[${LAST},${LAST},${LAST},${LAST},${LAST}]'}", "1"),
    "decode of text": grow("${oc.decode:${LAST}${LAST}${LAST}}", "'a'"),
    "decode of references": {"q": "\\${q2} \\${q2}", "q2": "${oc.decode:${q}}"},
    "long decode": {"a": "a " * 50_000, "x": "${oc.decode:${a}}"},
    "create": grow("${oc.create:[${LAST},${LAST},${LAST},${LAST},${LAST}]}", "1"),
    "create of groups": grow("${oc.create:{a: ${LAST}, b: ${LAST}, c: ${LAST}}}", "1"),
    "unused values": {"a": {f"k{n}": n for n in range(2_000)}}
    | {"x": "${or:1" + ",${oc.dict.values:a}" * 20 + "}"},
    "unused texts": {"a": "y" * 100_000, "x": "${or:1" + ",${a}" * 20 + "}"},
    "select": grow("${oc.select:LAST}" * 9),
    "or": grow("${or:null,'${LAST}${LAST}${LAST}${LAST}'}"),
    "unused arguments": grow("${or:1,${LAST},${LAST},${LAST},${LAST}}"),
    "names of keys": grow("${t.${LAST}}${t.${LAST}}${t.${LAST}}", "a") | {"t": {"a": "a"}},
    "nodes": {"x0": {"b": 1}}
    | {f"x{n}": dict.fromkeys("bc", f"${{x{n - 1}}}") for n in range(1, 20)},
    "groups of groups": {"a": {"b": "${c}"}, "c": {"d": "${a}"}},
    "select of itself": {"x": "${oc.select:x}"},
    "decode of itself": {"x": "${oc.decode:'${x}'}"},
}


@pytest.mark.parametrize("name", GROWING)
def test_resolve_stops_at_the_limit_with_one_error(name: str) -> None:
    resolvers.register()
    with pytest.raises(ConfigError, match=r"through its interpolations$") as caught:
        resolve(OmegaConf.create(GROWING[name]))
    (issue,) = caught.value.issues
    assert issue.key in GROWING[name] or "." in issue.key


def test_limited_interpolations_stop_whoever_resolves_them() -> None:
    config = OmegaConf.create(GROWING["text"])
    with limited_interpolations(), pytest.raises(OmegaConfBaseException, match="expand to more"):
        config.get("x13")


def test_composer_leaves_omegaconf_as_it_was() -> None:
    resolvers.register()
    before = *map(BaseContainer._resolvers.get, REPLACED), GrammarVisitor.visitInterpolation
    with open_composer(get_args_parser().parse_args(["model=mlp"])) as composer:
        config = composer.base
        assert isinstance(config, DictConfig)
        assert GrammarVisitor.visitInterpolation is not before[-1]
        resolve(config)
    after = *map(BaseContainer._resolvers.get, REPLACED), GrammarVisitor.visitInterpolation
    assert after == before


def test_yaml_problem_counts_texts_with_interpolations_by_their_length() -> None:
    assert yaml_problem("a: " + "x" * 100_000) is None
    assert yaml_problem("a: '${b}" + "x" * 20_000 + "'") is None
    aliases = "a: &a '${b}" + "x" * 1_000 + "'\nb: [" + "*a," * 100 + "]"
    for text in ("a: '" + "${b}" * 11_000 + "'", aliases):
        assert "take more than 1,000,000 characters" in str(yaml_problem(text))
