"""Untrusted configurations are refused in one line; nothing is imported, executed or written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from app.config.limits import MAX_INTERPOLATION_DEPTH
from app.runtime.errors import ConfigError
from tests.support.runs import RunResult, config_issues
from tests.support.sweeps import RunSweep, sweep_folder, sweep_runner

MARKER_MODULE = (
    "from pathlib import Path\nPath(__file__).with_name('imported').touch()\nclass Part: ...\n"
)
GRID = "hydra_plugins.app_sweeps.grid.GridSweeper"


@pytest.fixture
def untrusted_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with `conf/`, and a package that creates a file when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "__init__.py").write_text(MARKER_MODULE)
    (tmp_path / "conf").mkdir()
    return tmp_path


def refusal(
    untrusted_dir: Path, text: str, *arguments: str, name: str = "experiment/untrusted"
) -> str:
    """Return the issues of an experiment with that text, and check that nothing else happened."""
    path = untrusted_dir / "conf" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# @package _global_\n{text}\n")
    before = sorted(untrusted_dir.rglob("*"))
    try:
        issues = config_issues("--config-dir", "conf", "experiment=untrusted", *arguments)
    except ConfigError as error:
        issues = [str(issue) for issue in error.issues]
    assert issues, text
    after = [path for path in sorted(untrusted_dir.rglob("*")) if "__pycache__" not in path.parts]
    assert before == after, "something was imported or written"
    return "\n".join(issues)


TARGETS = (
    "trap.Part",
    "os.system",
    "builtins.eval",
    "torch.load",
    "torch.hub.load",
    "subprocess.run",
    "torchvision.models.feature_extraction.create_feature_extractor",
)


TARGET_PLACES = [  # configuration with a target NAME, and the key that is reported
    ("model: {_target_: NAME}", "model._target_"),
    ("model: {part: {_target_: NAME, _args_: [touch imported]}}", "model.part._target_"),
    ("model: {_args_: [{_target_: NAME}]}", "model._args_.0._target_"),
    ("model: {parts: [1, [{_target_: NAME}]]}", "model.parts.1.0._target_"),
    ("what: {name: NAME}\nmodel: {_target_: '${what.name}'}", "model._target_"),
    ("model: {_target_: '${oc.decode:NAME}'}", "model._target_"),
    ("model: {part: '${oc.decode:\"{_target_: NAME}\"}'}", "model.part._target_"),
    ("model: {part: {_target_: NAME, _partial_: true}}", "model.part._target_"),
    ("callbacks: {evil: {_target_: NAME}}", "callbacks.evil._target_"),
    ("hydra: {callbacks: {evil: {_target_: NAME}}}", "hydra.callbacks.evil._target_"),
    ("hydra: {sweeper: {_target_: NAME}}", "hydra.sweeper._target_"),
    ("hydra: {launcher: {_target_: NAME}}", "hydra.launcher._target_"),
    ("hydra: {launcher: {deep: [{_target_: NAME}]}}", "hydra.launcher.deep.0._target_"),
    ("hydra: {sweeper: {sampler: {_target_: NAME}}}", "hydra.sweeper.sampler._target_"),
    ("hydra: {job_logging: {handlers: {file: {class: NAME}}}}", "handlers.file.class"),
    ("hydra: {job_logging: {handlers: {file: {(): NAME}}}}", "handlers.file.()"),
    ("hydra: {hydra_logging: {filters: {evil: {(): NAME}}}}", "filters.evil.()"),
    ("hydra: {job_logging: {handlers: {console: {stream: ext://NAME}}}}", "console.stream"),
]


@pytest.mark.parametrize(
    ("number", "text", "key"), [(n, *place) for n, place in enumerate(TARGET_PLACES)]
)
def test_target_that_executes_code_is_refused_with_its_key(
    untrusted_dir: Path, number: int, text: str, key: str
) -> None:
    name = TARGETS[number % len(TARGETS)]
    message = refusal(untrusted_dir, text.replace("NAME", name), "hydra/launcher=pool")
    assert key in message
    assert name in message


MISPLACED = "{_target_: app.data.cached.cached, file: written.npz, dataset: {_target_: NAME}}"


@pytest.mark.parametrize("place", ["loss", "metric.valid", "data.augment", "data.transforms.eval"])
def test_dataset_that_validation_would_build_is_refused(untrusted_dir: Path, place: str) -> None:
    opening, closing = f"{place.replace('.', ': {')}: {{", "}" * place.count(".")
    node = MISPLACED.replace("NAME", "torchvision.datasets.FakeData")
    message = refusal(untrusted_dir, f"{opening}x: {node}}}{closing}")
    assert f"{place}.x._target_='app.data.cached.cached' is a part of data or callbacks" in message


LATE = "{_target_: hydra.experimental.callbacks.LogJobReturnCallback, a: '${hydra.job.num}'}"
SETTINGS = {  # of Hydra's, by what is said of them
    "hydra.callbacks.evil._target_='a.b' is not allowed": [
        "what: {_target_: a.b}\nhydra: {callbacks: {evil: '${what}'}}",
        "what: {a: {_target_: a.b}}\nhydra: {callbacks: {evil: '${oc.select:what.a}'}}",
    ],
    "is not a dotted name": ["hydra: {callbacks: {evil: {_target_: '${seed}'}}}"],
    "hydra.callbacks.a._target_='os.system' is not allowed": [
        "hydra: {callbacks: '${oc.decode:\"{a: {_target_: os.system}}\"}'}"
    ],
    "does not resolve before a job starts": [f"hydra: {{callbacks: {{evil: {LATE}}}}}"],
    "interpolations are not allowed": [
        "hydra: {job_logging: {handlers: {console: {level: '${name}'}}}}",
        "hydra: {job_logging: {handlers: {file: {filename: {a: '${hydra.sweep.dir}'}}}}}",
    ],
    "console.stream='cfg://a' is not": [
        "hydra: {job_logging: {handlers: {console: {stream: cfg://a}}}}"
    ],
    "attributes of handlers": [
        "hydra: {job_logging: {handlers: {file: {'.': {baseFilename: a}}}}}"
    ],
    "can only be set on the command line": [
        *("hydra: {output_subdir: ../../.ssh}", "hydra: {output_subdir: '${notes}'}"),
        *("hydra: {job: {name: ../a}}", "hydra: {sweep: {subdir: '${hydra.job.num}/${notes}'}}"),
        "what: {LD_PRELOAD: a}\nhydra: {job: {env_set: '${what}'}}",
        "hydra: {job: {env_set: {LD_PRELOAD: ./evil.so}}}",
        "hydra: {job: {env_set: {APP_TRUSTED_TARGETS: os}}}",
        "hydra: {sweeper: {params: {trusted_targets: '[os]'}}}",
        "hydra: {sweeper: {params: {+hydra.job.env_set.A: b}}}",
        "trusted_targets: [os]",
    ],
    "which is not on the command line": ["hydra: {overrides: {task: ['trusted_targets=[os]']}}"],
}


@pytest.mark.parametrize("message", SETTINGS)
def test_hydra_setting_in_config_file_is_refused(untrusted_dir: Path, message: str) -> None:
    for text in SETTINGS[message]:
        assert message in refusal(untrusted_dir, text), text


NO_LOG_FILES = (
    *("/tmp/a.log", "a.log", "a/.bashrc", "'${notes}'", "'${hydra.run.dir}/../a.log'"),
    *("'${hydra.runtime.output_dir}/${notes}.log'", "'${hydra.sweep.dir}/a/b.log'"),
    *("'${hydra.runtime.output_dir}/../a.log'", "'${hydra.runtime.output_dir}x.log'"),
)


@pytest.mark.parametrize("node", ["job_logging", "hydra_logging"])
def test_log_file_outside_the_run_folder_is_refused(untrusted_dir: Path, node: str) -> None:
    filters = ", ".join(f"x{n}: {{filename: {name}}}" for n, name in enumerate(NO_LOG_FILES))
    text = f"notes: ../x\nhydra: {{run: {{dir: a}}, {node}: {{filters: {{{filters}}}}}}}"
    issues = refusal(untrusted_dir, text).splitlines()
    assert len(issues) == len(NO_LOG_FILES)
    for number, issue in enumerate(issues):
        assert f"hydra.{node}.filters.x{number}.filename" in issue
        assert "is not a .log file in the run folder" in issue


@pytest.mark.parametrize(
    "arguments",
    [
        ("hydra.searchpath=[pkg://trap]",),
        ("--config-dir", "conf", "--config-name", "primary"),
        ("--config-path", "pkg://trap"),
    ],
)
def test_searchpath_package_is_not_imported(
    untrusted_dir: Path, arguments: tuple[str, ...]
) -> None:
    text = "hydra: {searchpath: ['pkg://trap']}\n"
    (untrusted_dir / "conf" / "primary.yaml").write_text(text)
    with pytest.raises(ConfigError, match="pkg:"):
        config_issues(*arguments)
    assert not (untrusted_dir / "trap" / "imported").exists()


def test_code_in_the_name_of_a_part_is_refused(untrusted_dir: Path) -> None:
    name = 'a" + str(open("was_here", "w")) + "'
    node = {"_target_": "torch.nn.ModuleDict", "modules": {name: {"_target_": "torch.nn.ReLU"}}}
    message = refusal(untrusted_dir, json.dumps({"model": node}))
    assert f"model.modules: {name!r} cannot name a part" in message


@pytest.mark.parametrize(
    "name",
    [
        "hydra.experimental.callbacks.Path",
        "optuna.samplers.nsgaii.BaseCrossover",
        "torch.nn.Linear",
    ],
)
def test_hydra_component_of_another_kind_is_refused(untrusted_dir: Path, name: str) -> None:
    text = f"hydra: {{callbacks: {{evil: {{_target_: {name}}}}}}}"
    assert f"hydra.callbacks.evil._target_={name!r} is not allowed" in refusal(untrusted_dir, text)


@pytest.mark.usefixtures("untrusted_dir")
def test_hydra_callback_with_trusted_target_is_allowed() -> None:
    node = "+hydra.callbacks.mine._target_=trap.Part"
    assert config_issues(node, "trusted_targets=[trap]") == []
    with pytest.raises(ConfigError, match=r"mine\._target_='trap\.Part' is not allowed"):
        config_issues(node)


@pytest.mark.parametrize(
    "arguments",
    [
        ("-m", "seed=0,1", "hydra/launcher=pool"),
        ("-m", "seed=0,1", "hydra/sweeper=optuna", "hydra/sweeper/pruner=median"),
        ("hydra/job_logging=default", "hydra.verbose=true"),
        ("hydra/job_logging=disabled", "hydra.output_subdir=null"),
        ("+hydra.job.env_set.OMP_NUM_THREADS='1'", "hydra.job_logging.handlers.file.filename=/a"),
        ("hydra.output_subdir=../x", "hydra.sweep.subdir=../x", "hydra.run.dir=../x"),
    ],
)
def test_hydra_builtin_options_are_allowed(arguments: tuple[str, ...]) -> None:
    assert config_issues(*arguments) == []


def test_command_with_untrusted_callback_writes_nothing(
    app: Callable[..., RunResult], tmp_path: Path
) -> None:
    (tmp_path / "trap.py").write_text(MARKER_MODULE)
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    text = "# @package _global_\nhydra: {callbacks: {evil: {_target_: trap.Part}}}\n"
    (tmp_path / "conf" / "experiment" / "untrusted.yaml").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    for arguments in ((), ("-m", "seed=0,1")):
        ran = app("--config-dir", "conf", *arguments, "experiment=untrusted", "model=mlp")
        assert ran.code == 2
        assert "hydra.callbacks.evil._target_='trap.Part' is not allowed" in ran.err
        assert "Traceback" not in ran.err
    assert before == sorted(tmp_path.rglob("*"))


def test_experimental_rerun_is_refused(app: Callable[..., RunResult]) -> None:
    ran = app("--experimental-rerun", "config.pickle")
    assert ran.code == 2
    assert "would execute code from a pickle file" in ran.err


# ---- size and depth limits


BILLION_LAUGHS = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
DOUBLES = "".join(f"x{n}: '{f'${{x{n + 1}}}' * 8}'\n" for n in range(12)) + "x12: ha\n"
TOO_LARGE = {
    "billion laughs": (BILLION_LAUGHS, "take more than 1,000,000 characters"),
    "deep": ("x: " + "[" * 500 + "]" * 500, "lists and groups more than 64 deep"),
    # Some versions of libyaml have a limit of their own, and refuse this one first.
    "very deep": ("x: " + "[" * 10_000 + "]" * 10_000, "cannot be read"),
    "deep groups": ("x: " + "{a: " * 10_000 + "}" * 10_000, "lists and groups more than 64 deep"),
    "deep aliases": (
        "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 200)),
        "lists and groups more than 64 deep",
    ),
    "alias of itself": ("x: &x [*x]", "refers to itself"),
    "long": ("x: " + "y" * 1_100_000, "bytes; allowed: 1,000,000"),
    "many": ("x: [" + "1, " * 30_000 + "]", "take more than 1,000,000 characters"),
    "no yaml": ("x: [1", "cannot be read"),
    "no text": ("x: \0", "cannot be read"),
    "python": ("x: !!python/object/apply:os.system [touch imported]", "cannot be read"),
    "big number": ("x: " + "9" * 10_000, "cannot be read"),
    "doubles": (DOUBLES, "would expand to more than 1,000,000 characters"),
    "cycle": ("x: '${y}'\ny: '${x}'", "refers to itself through its interpolations"),
    "chain": (
        "".join(f"x{n}: '${{x{n + 1}}}'\n" for n in range(500)) + "x500: 1\n",
        f"is nested more than {MAX_INTERPOLATION_DEPTH} deep through its interpolations",
    ),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_file_over_limit_is_refused_in_one_line(untrusted_dir: Path, case: str) -> None:
    text, message = TOO_LARGE[case]
    issues = refusal(untrusted_dir, text)
    assert message in issues
    assert len(issues.splitlines()) == 1
    assert len(issues) < 1_000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("x=" + "[" * 10_000, "allowed: 10,000"),
        ("x=" + "[" * 1_000, "nests brackets more than 64 deep"),
        ("x=" + "{a:" * 1_000, "nests brackets more than 64 deep"),
        ("x=" + "${" * 1_000, "nests brackets more than 64 deep"),
        ("x=" + "y" * 100_000, "has 100,002 characters; allowed: 10,000"),
    ],
)
def test_override_over_limit_is_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_issues(override)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize("arguments", [("--cfg", "job", "--resolve"), ("--help",), ()])
def test_command_with_exponential_config_exits_at_once(
    app: Callable[..., RunResult], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "untrusted.yaml").write_text(
        f"# @package _global_\n{DOUBLES}"
    )
    ran = app("--config-dir", "conf", "experiment=untrusted", *arguments)
    assert ran.code == 2
    assert "would expand to more than 1,000,000 characters" in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "outputs").exists()


def test_long_config_within_limits_is_accepted(untrusted_dir: Path) -> None:
    names = ", ".join(f"a{n}" for n in range(2_000))
    text = (
        f"# @package _global_\ntags: [{names}]\nnotes: '{'x' * 20_000} ${{seed}} ${{data.name}}'\n"
    )
    path = untrusted_dir / "conf" / "experiment" / "fine.yaml"
    path.parent.mkdir()
    path.write_text(text)
    assert config_issues("--config-dir", "conf", "experiment=fine") == []


# ---- sweep folders


@pytest.fixture(scope="module")
def finished_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished sweep with one job."""
    cwd = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        assert sweep_runner(cwd, patch)("seed=0", "trainer.max_epochs=1") == 0
    return sweep_folder(cwd)


@pytest.fixture
def sweep_to_resume(finished_sweep: Path, tmp_path: Path) -> Path:
    """Copy of the finished sweep whose job has to run again."""
    folder = Path(shutil.copytree(finished_sweep, tmp_path / "swept"))
    (job,) = (path for path in folder.iterdir() if path.name.startswith("0_"))
    shutil.rmtree(job)
    return folder


def change_file(folder: Path, name: str, change: Callable[[str], str]) -> None:
    (path,) = (folder / ".sweep").glob(name)
    path.write_text(change(path.read_text()))


def add_override(override: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        content = json.loads(text)
        content["words"].append(override)
        return json.dumps(content)

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sweep.json", add_override("trusted_targets=[os]"), "started with trusted_targets=[os]"),
        (
            "sweep.json",
            add_override("+hydra.job.env_set.A=b"),
            "started with +hydra.job.env_set.A=b",
        ),
        ("sweep.json", add_override("hydra.searchpath=[pkg://a]"), "started with hydra.searchpath"),
        (
            "sweep.json",
            lambda text: text.replace('"folder": "', '"folder": "../../'),
            "not the name of a job folder",
        ),
        ("sweep.json", lambda text: text[:50], "is damaged"),
        (
            "conf/*/model/mlp.yaml",
            lambda text: text.replace("app.models.mlp.MLP", "os.system"),
            "'os.system' is not allowed",
        ),
        (
            "conf/*/hydra/job_logging/app.yaml",
            lambda text: text.replace("logging.FileHandler", "os.system"),
            "'os.system' is not allowed",
        ),
        (
            "conf/*/config.yaml",
            lambda text: f"{text}\nbomb: {'[' * 500}",
            "lists and groups more than 64 deep",
        ),
    ],
)
def test_resume_sweep_with_untrusted_changes_is_refused(
    sweep_to_resume: Path,
    sweep: RunSweep,
    capfd: pytest.CaptureFixture[str],
    name: str,
    change: Callable[[str], str],
    message: str,
) -> None:
    change_file(sweep_to_resume, name, change)
    before = sorted(sweep_to_resume.rglob("*"))
    capfd.readouterr()
    assert sweep(f"sweep.resume={sweep_to_resume}", short=False) == 2
    err = capfd.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert before == sorted(sweep_to_resume.rglob("*"))


def test_resume_sweep_never_writes_through_a_link_in_a_job_folder(
    sweep_to_resume: Path, sweep: RunSweep, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (outside := tmp_path / "outside.log").write_text("mine")
    (job,) = json.loads((sweep_to_resume / ".sweep" / "sweep.json").read_text())["jobs"]
    (sweep_to_resume / job["folder"]).mkdir()
    (sweep_to_resume / job["folder"] / "run.log").symlink_to(outside)
    assert sweep(f"sweep.resume={sweep_to_resume}", short=False) == 2
    assert "run.log is a symbolic link, which runs do not write through" in capfd.readouterr().err
    assert outside.read_text() == "mine"


def test_resume_sweep_with_trusted_targets_given_again_is_accepted(
    sweep_to_resume: Path, sweep: RunSweep
) -> None:
    change_file(sweep_to_resume, "sweep.json", add_override("trusted_targets=[sweep_task]"))
    arguments = (f"sweep.resume={sweep_to_resume}", "trusted_targets=[sweep_task]")
    assert sweep(*arguments, short=False) == 0
