"""Secrets from environment variables: used by the run, and never saved, logged or shown."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from hydra._internal.utils import get_args_parser
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError

from app.cli.main import print_config
from app.config import resolvers
from app.config.compose import open_composer
from app.config.resolve import resolve
from app.config.saved import half_resolve, resolve_saved
from app.config.secrets import looks_secret, redact_text, reveal_text
from app.config.types import UNKNOWN
from app.distributed.launch.failures import RankFailure
from app.runtime.errors import ConfigError
from app.training.checkpoint.checkpoint import load_checkpoint
from tests.support.runs import RunResult, config_issues, job_for

TOKEN = "hunter2-hunter2"
CALLBACK_MODULE = """
from app.training.events import Callback


class Tracker(Callback):
    def __init__(self, api, url, suffix, config, folder):
        with open("calls.txt", "a") as file:
            file.write(f"{api} {url} {'@' in str(config)} ")
        self.message = f"{api} is wrong"

    def on_run_end(self, history):
        import os
        if "BREAK" in os.environ:
            raise RuntimeError(self.message)
"""
OVERRIDES = (
    *("+callbacks.tracker._target_=tracker.Tracker", "trusted_targets=[tracker]"),
    *("+callbacks.tracker.api='${ oc.env:MY_${.suffix}}'", "+callbacks.tracker.suffix=API_TOKEN"),
    "+callbacks.tracker.url=${oc.env:MY_URL}",
    *("+tags=['a ${callbacks.tracker.api}']", "model=mlp", "debug=fast"),
    "~callbacks.plots",
)


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [
        *((name, True) for name in ("WANDB_API_KEY", "HF_TOKEN", "db_password", "AUTH", "secret")),
        *((name, True) for name in ("AWS_SECRET_ACCESS_KEY", "credentials", "key", "OPENAI-KEY")),
        *(
            (name, False)
            for name in ("APP_DATA", "HOME", "KEYBOARD", "author", "monkey", "path", "PWD")
        ),
    ],
)
def test_looks_secret_recognizes_names_of_secrets(name: str, is_secret: bool) -> None:
    assert looks_secret(name) is is_secret


def test_secret_is_passed_to_callback_but_never_saved(
    app: Callable[..., RunResult], tmp_path: Path
) -> None:
    (tmp_path / "tracker.py").write_text(CALLBACK_MODULE)
    environment = {"MY_API_TOKEN": TOKEN, "MY_URL": "http://tracker"}
    ran = app(*OVERRIDES, **environment)
    assert ran.code == 0, ran.err + ran.out
    assert (tmp_path / "calls.txt").read_text().startswith(f"{TOKEN} http://tracker")
    assert files_containing(tmp_path / "outputs", TOKEN) == []
    assert TOKEN not in ran.out + ran.err
    assert ran.config["callbacks"]["tracker"]["api"] == "${oc.env:MY_API_TOKEN}"
    assert ran.config["callbacks"]["tracker"]["url"] == "http://tracker"
    assert ran.config["tags"] == ["a ${oc.env:MY_API_TOKEN}"]
    saved = load_checkpoint(ran.folder / "checkpoints" / "best.safetensors").config
    assert saved is not None
    assert TOKEN not in str(saved)
    overrides = (f"ckpt={ran.folder}", "mode=test", "trusted_targets=[tracker]")
    not_allowed = app(*overrides, MY_API_TOKEN="another-token", MY_URL="http://tracker")
    assert not_allowed.code == 2
    assert (
        "the saved run reads this variable; to allow it, add ++callbacks.tracker.api="
        in not_allowed.err
    )
    overrides = (*overrides, "++callbacks.tracker.api=${oc.env:MY_API_TOKEN}")
    missing = app(*overrides, MY_URL="http://tracker")
    assert missing.code == 2
    assert "callbacks.tracker.api" in missing.err
    assert "'MY_API_TOKEN' not found" in missing.err
    again = app(*overrides, MY_API_TOKEN="another-token", MY_URL="http://tracker")
    assert again.code == 0, again.err
    assert "another-token http://tracker" in (tmp_path / "calls.txt").read_text()
    assert files_containing(tmp_path / "outputs", "another-token") == []


def test_sweep_never_saves_secret(app: Callable[..., RunResult], tmp_path: Path) -> None:
    (tmp_path / "tracker.py").write_text(CALLBACK_MODULE)
    ran = app("-m", *OVERRIDES, "seed=0,1", MY_API_TOKEN=TOKEN, MY_URL="http://tracker", BREAK="1")
    assert ran.code == 1
    assert "is wrong" in ran.out + ran.err
    assert TOKEN not in ran.out + ran.err
    assert files_containing(tmp_path / "outputs", TOKEN) == []
    (base,) = tmp_path.glob("outputs/sweeps/*/*/.sweep/base.yaml")
    assert yaml.safe_load(base.read_text())["callbacks"]["tracker"]["url"] == "http://tracker"


def files_containing(folder: Path, text: str) -> list[Path]:
    """Return the files below the folder that contain the text."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if text.encode() in path.read_bytes()]


# ---- every way to spell that a variable is read

READS = (
    *("${oc.env:TOKEN}", "${ oc.env:TOKEN}", "${oc.env: TOKEN }", "${oc.env:'TOKEN'}"),
    *('${oc.env:"TOKEN"}', "${oc.env:TOKEN,none}", "${oc.env:${var}}", "${oc.env:TOK${end}}"),
    *("${oc.${kind}:TOKEN}", "${${ns}.env:TOKEN}", "${oc.env:NOT_SET,${oc.env:TOKEN}}"),
    *("${oc.env:SHORT_KEY}", "${oc.env:PIN_KEY}", "${oc.env:MAP_KEY}", "${oc.env:PATH_KEY}"),
)
WRAPPERS = (
    *("THIS", "aTHISb", "THISTHIS", "u:THIS@host/${size}", "${or:THIS,1}", "${or:null,THIS}"),
    *("${oc.decode:THIS}", "${oc.decode:'\"THIS\"'}", "${oc.decode:'[1, THIS]'}", "${path:THIS}"),
    *("${oc.decode:'{a: THIS}'}", "${oc.decode:'{THIS: 1}'}", "${oc.create:{a: 'THIS'}}"),
    *("${oc.create:[THIS, 1]}", "${or:'THIS',2}", "${table.THIS}", "${oc.select:table.THIS}"),
    *("${oc.select:nothing,THIS}", "${image_part:[1,2,THIS],2}", "${image_part:'aTHIS',0}"),
    *("${run_folder:null,x/THIS}", "${run_name:test,THIS,a,b}", "\\\\THIS", "\\THIS"),
    "${upper:THIS}",
)
ENVIRONMENT = {
    "TOKEN": TOKEN,
    "SHORT_KEY": "q7Zx",
    "PIN_KEY": "48151623",
    "MAP_KEY": "{b: [xyzzy-1]}",
    "PATH_KEY": "/mnt/xyzzy-2",
}
PARTS = (TOKEN, TOKEN.upper(), "q7Zx", "48151623", "xyzzy")  # what no file may contain


def random_form(rng: random.Random) -> str:
    text = rng.choice(READS)
    for _ in range(rng.randint(1, 3)):
        text = rng.choice(WRAPPERS).replace("THIS", text)
    return text


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Secret variables, and a resolver that transforms its argument."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    resolvers.register()
    OmegaConf.register_new_resolver("upper", lambda text: str(text).upper())
    yield
    OmegaConf.clear_resolver("upper")


SETTINGS_OF_HYDRA = (
    "+hydra.sweeper.params.notes=${oc.env:SHORT_KEY}",
    "+hydra.sweeper.params.api_key=${oc.env:PUBLIC}",
    "+hydra.sweeper.study_name=a${oc.env:SHORT_KEY}",
    "hydra.run.dir=out/${oc.env:TOKEN}",
    "hydra.sweep.subdir='a${oc.decode:${oc.env:TOKEN}}'",
    "hydra.job_logging.handlers.file.filename=/x/${oc.env:SHORT_KEY}",
    "hydra.job.config.override_dirname.kv_sep=${oc.env:TOKEN}",
    "+hydra.job.env_set.COPY=${oc.env:TOKEN}",
)
NAMES = (
    "name=${ oc.env:TOKEN}",
    "data.class_names=[${oc.env:SHORT_KEY},b,c,d,e,f,g,h,i,j]",
    "data.class_names=['\\${oc.env:SHORT_KEY}',b,c,d,e,f,g,h,i,j]",
    "+metric.valid.x={_target_: torchmetrics.wrappers.ClasswiseWrapper,"
    " prefix: '${oc.env:SHORT_KEY}', metric: ${metric.valid.accuracy}}",
    "data.split.valid=null\n"
    "data.source.valid={_target_: app.data.cached.cached, file: '/x/${oc.env:TOKEN}.npz',"
    " dataset: ${data.source.train}}",
)


@pytest.mark.usefixtures("environment")
def test_secret_in_a_setting_of_hydra_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUBLIC", "public")
    with pytest.raises(ConfigError) as caught:
        job_for(*SETTINGS_OF_HYDRA)
    refused = [
        str(issue) for issue in caught.value.issues if "must not contain a secret" in str(issue)
    ]
    for setting in SETTINGS_OF_HYDRA:
        key = setting.lstrip("+").partition("=")[0]
        assert any(issue.startswith(key) for issue in refused), (key, refused)
    assert not [value for value in ENVIRONMENT.values() if value in str(caught.value)]


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("overrides", NAMES)
def test_secret_in_what_becomes_a_name_is_refused(overrides: str) -> None:
    with pytest.raises(ConfigError, match="must not contain a secret") as caught:
        job_for(*overrides.splitlines())
    assert not [value for value in ENVIRONMENT.values() if value in str(caught.value)]


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("seed", range(10))
def test_resolve_saves_no_secret_however_it_is_read(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        form = random_form(rng)
        values = {"x": form, "y": ["${x}", "${z.0}"], "z": [{"deep": "${x}"}]}
        keys = {"size": 3, "var": "TOKEN", "end": "EN", "kind": "env", "ns": "oc"}
        try:
            config = OmegaConf.create({**values, **keys, "table": {TOKEN: "chosen"}})
        except GrammarParseError:
            continue
        plain, issues = resolve(config)
        saved = half_resolve(config, plain)
        texts = [str(issues), *(json.dumps({**each, "table": 0}) for each in (plain, saved))]
        assert not [part for part in PARTS if any(part in text for text in texts)], form
        assert issues or resolve_saved(saved) == plain, form


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("read", READS)
def test_reveal_inserts_the_value_in_text_however_it_is_read(read: str) -> None:
    text = f"https://u:{read}@host/${{size}}"
    keys = {"size": 3, "var": "TOKEN", "end": "EN", "kind": "env", "ns": "oc"}
    config = OmegaConf.create({"x": text, "y": ["${x}"], **keys})
    plain, _ = resolve(config)
    assert reveal_text(plain["y"][0]) == OmegaConf.to_container(config, resolve=True)["y"][0]


@pytest.mark.usefixtures("environment")
def test_resolve_computes_nothing_from_a_secret() -> None:
    upper, decoded, chosen = (
        *("${upper:${oc.env:TOKEN}}", "${oc.decode:${oc.env:PIN_KEY}}"),
        "${table.${oc.env:TOKEN}}",
    )
    config = OmegaConf.create({"x": [upper, decoded, chosen], "table": {TOKEN: "chosen"}})
    plain, (issue,) = resolve(config)
    assert plain["x"] == ["${OC.ENV:TOKEN}", "${oc.env:PIN_KEY}", UNKNOWN]
    assert "'table.${oc.env:TOKEN}' not found" in str(issue)


def test_resolve_hides_a_variable_that_only_a_key_shows_to_be_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PLAIN", "correct-horse")
    monkeypatch.setenv("OTHER", "battery-staple")
    resolvers.register()
    reads = {"url": "u-${oc.env:PLAIN}", "api_key": ["${oc.env:PLAIN}"]}
    through = {"notes": "${oc.env:OTHER}", "callbacks": {"x": {"password": "${notes}"}}}
    plain, issues = resolve(OmegaConf.create(reads | through))
    assert issues == []
    assert plain["url"] == "u-${oc.env:PLAIN}"
    assert plain["notes"] == plain["callbacks"]["x"]["password"] == "${oc.env:OTHER}"
    assert redact_text("a battery-staple") == "a ${oc.env:OTHER}"


@pytest.mark.usefixtures("environment")
def test_composition_inserts_no_secret_into_what_hydra_saves(tmp_cwd: Path) -> None:
    """Hydra resolves an interpolation to a group when another file adds keys to it."""
    for name, text in {
        "experiment/first": "mine: {node: '${oc.create:{x: ${oc.env:TOKEN}}}'}",
        "debug/second": "mine: {node: {y: 1}}",
    }.items():
        (tmp_cwd / name).parent.mkdir()
        (tmp_cwd / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    with open_composer(get_args_parser().parse_args(["--config-dir", "."])) as composer:
        loader = composer.hydra.config_loader
    overrides = ["experiment=first", "debug=second"]  # as a launcher does in another process
    composed = loader.load_configuration("config", overrides, RunMode.RUN)
    assert TOKEN not in OmegaConf.to_yaml(composed)
    assert resolve(composed)[0]["mine"] == {"node": {"x": "${oc.env:TOKEN}", "y": 1}}


def test_printed_config_hides_what_was_read_for_a_secret_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUBLIC_NAME", "s3cret-value")
    override = "+callbacks.x.api_key=${oc.env:PUBLIC_NAME}"
    resolvers.register()
    parser = get_args_parser()
    print_config(parser.parse_args(["--cfg", "job", "--resolve", override]), parser)
    assert "api_key: ${oc.env:PUBLIC_NAME}" in capsys.readouterr().out


@pytest.mark.usefixtures("environment")
def test_error_in_the_data_does_not_reveal_secret(tmp_cwd: Path) -> None:
    (tmp_cwd / "x.csv").write_text("a,label\n1,0\n2,1\n")
    source = ("data=csv", "data.path=x.csv", "data.source.train.target=${oc.env:TOKEN}")
    with pytest.raises(ConfigError, match=r"no column '\$\{oc\.env:TOKEN\}'"):
        job_for(*source, "model=mlp")


def test_errors_do_not_reveal_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", TOKEN)
    (issue,) = config_issues("optimizer.lr=${oc.env:MY_API_TOKEN}")
    assert "optimizer.lr='${oc.env:MY_API_TOKEN}' is not valid" in issue
    failure = RankFailure.from_exception(0, RuntimeError(f"{TOKEN} is wrong"))
    assert TOKEN not in failure.error + failure.trace


def test_path_from_environment_is_not_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DATA", "/my/data")
    assert job_for("data=cifar10").plain["data"]["source"]["train"]["root"] == "/my/data"


def test_env_copy_of_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", TOKEN)
    with pytest.raises(ConfigError, match=r"env_set\.MY_API_TOKEN would be saved with the run"):
        config_issues("hydra.job.env_copy=[MY_API_TOKEN]")
