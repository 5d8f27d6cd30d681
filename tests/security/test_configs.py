"""Configurations of strangers: refused in a line; nothing is imported, run or written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from app.config.limits import DEEPEST
from app.runtime.errors import ConfigError
from tests.support.runs import Ran, mistakes_in
from tests.support.sweeps import Sweeps, folder_of, in_this_process

TRAP = "from pathlib import Path\nPath(__file__).with_name('sprung').touch()\nclass Part: ...\n"
GRID = "hydra_plugins.app_sweeps.grid.GridSweeper"


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with configurations, and beside it a package that leaves a file when imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "__init__.py").write_text(TRAP)
    (tmp_path / "conf").mkdir()
    return tmp_path


def refused(stranger: Path, text: str, *words: str, name: str = "experiment/sly") -> str:
    """What is said of an experiment with that text; nothing else has happened."""
    path = stranger / "conf" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# @package _global_\n{text}\n")
    before = sorted(stranger.rglob("*"))
    try:
        found = mistakes_in("--config-dir", "conf", "experiment=sly", *words)
    except ConfigError as error:
        found = [str(mistake) for mistake in error.issues]
    assert found, text
    after = [path for path in sorted(stranger.rglob("*")) if "__pycache__" not in path.parts]
    assert before == after, "something was imported or written"
    return "\n".join(found)


RUNS_CODE = ("os.system", "builtins.eval", "torch.load", "torch.hub.load", "subprocess.run")


WHERE = [  # how a stranger would name them, and the key that is told
    ("model: {_target_: NAME}", "model._target_"),
    ("model: {part: {_target_: NAME, _args_: [touch sprung]}}", "model.part._target_"),
    ("model: {_args_: [{_target_: NAME}]}", "model._args_.0._target_"),
    ("model: {parts: [1, [{_target_: NAME}]]}", "model.parts.1.0._target_"),
    ("what: {name: NAME}\nmodel: {_target_: '${what.name}'}", "model._target_"),
    ("model: {_target_: '${oc.decode:NAME}'}", "model._target_"),
    ("model: {part: '${oc.decode:\"{_target_: NAME}\"}'}", "model.part._target_"),
    ("model: {part: {_target_: NAME, _partial_: true}}", "model.part._target_"),
    ("callbacks: {sly: {_target_: NAME}}", "callbacks.sly._target_"),
    ("hydra: {callbacks: {sly: {_target_: NAME}}}", "hydra.callbacks.sly._target_"),
    ("hydra: {sweeper: {_target_: NAME}}", "hydra.sweeper._target_"),
    ("hydra: {launcher: {_target_: NAME}}", "hydra.launcher._target_"),
    ("hydra: {launcher: {deep: [{_target_: NAME}]}}", "hydra.launcher.deep.0._target_"),
    ("hydra: {sweeper: {sampler: {_target_: NAME}}}", "hydra.sweeper.sampler._target_"),
    ("hydra: {job_logging: {handlers: {file: {class: NAME}}}}", "handlers.file.class"),
    ("hydra: {job_logging: {handlers: {file: {(): NAME}}}}", "handlers.file.()"),
    ("hydra: {hydra_logging: {filters: {sly: {(): NAME}}}}", "filters.sly.()"),
    ("hydra: {job_logging: {handlers: {console: {stream: ext://NAME}}}}", "console.stream"),
]


@pytest.mark.parametrize(("number", "text", "key"), [(n, *one) for n, one in enumerate(WHERE)])
def test_what_runs_code_is_refused_and_named(
    stranger: Path, number: int, text: str, key: str
) -> None:
    for name in ("trap.Part", RUNS_CODE[number % len(RUNS_CODE)]):
        said = refused(stranger, text.replace("NAME", name), "hydra/launcher=pool")
        assert key in said
        assert name in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("what: {_target_: a.b}\nhydra: {callbacks: {sly: '${what}'}}", "hydra.callbacks.sly"),
        ("hydra: {callbacks: {sly: {_target_: '${seed}'}}}", "is not a dotted name"),
        ("hydra: {callbacks: '${oc.decode:\"{a: {_target_: os.system}}\"}'}", "hydra.callbacks="),
        ("hydra: {job_logging: {handlers: {console: {level: '${name}'}}}}", "is written out"),
        ("hydra: {job_logging: {handlers: {console: {stream: cfg://a}}}}", "console.stream"),
        ("hydra: {job_logging: {handlers: {file: {filename: /tmp/a}}}}", "not in the run folder"),
        (
            "hydra: {job_logging: {handlers: {file: {filename: '${hydra.run.dir}/../../a'}}}}",
            "not in the run folder",
        ),
        ("hydra: {output_subdir: ../../.ssh}", "is no folder inside the run's"),
        ("hydra: {job: {name: ../a}}", "is no plain name"),
        ("hydra: {job: {env_set: {LD_PRELOAD: ./sly.so}}}", "hydra.job.env_set.LD_PRELOAD"),
        ("hydra: {job: {env_set: {APP_TRUSTED_TARGETS: os}}}", "on the command line only"),
        ("hydra: {sweeper: {params: {trusted_targets: '[os]'}}}", "on the command line only"),
        ("hydra: {sweeper: {params: {+hydra.job.env_set.A: b}}}", "on the command line only"),
        ("hydra: {overrides: {task: ['trusted_targets=[os]']}}", "which was not typed"),
        ("trusted_targets: [os]", "may be given on the command line only"),
    ],
)
def test_what_hydra_would_act_on_is_refused(stranger: Path, text: str, said: str) -> None:
    assert said in refused(stranger, text)


@pytest.mark.parametrize(
    "words",
    [
        ("hydra.searchpath=[pkg://trap]",),
        ("--config-dir", "conf", "--config-name", "primary"),
        ("--config-path", "pkg://trap"),
    ],
)
def test_a_package_to_be_searched_is_not_imported(stranger: Path, words: tuple[str, ...]) -> None:
    text = "hydra: {searchpath: ['pkg://trap']}\n"
    (stranger / "conf" / "primary.yaml").write_text(text)
    with pytest.raises(ConfigError, match="pkg:"):
        mistakes_in(*words)
    assert not (stranger / "trap" / "sprung").exists()


@pytest.mark.usefixtures("stranger")
def test_what_the_user_trusts_is_used() -> None:
    node = "+hydra.callbacks.mine._target_=trap.Part"
    assert mistakes_in(node, "trusted_targets=[trap]") == []
    with pytest.raises(ConfigError, match=r"mine\._target_='trap\.Part' is not allowed"):
        mistakes_in(node)


@pytest.mark.parametrize(
    "words",
    [
        ("-m", "seed=0,1", "hydra/launcher=pool"),
        ("-m", "seed=0,1", "hydra/sweeper=optuna", "hydra/sweeper/pruner=median"),
        ("hydra/job_logging=default", "hydra.verbose=true"),
        ("hydra/job_logging=disabled", "hydra.output_subdir=null"),
        ("+hydra.job.env_set.OMP_NUM_THREADS='1'", "hydra.job_logging.handlers.file.filename=/a"),
    ],
)
def test_what_hydra_itself_brings_is_used(words: tuple[str, ...]) -> None:
    assert mistakes_in(*words) == []


def test_the_command_refuses_before_anything_is_written(
    app: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "trap.py").write_text(TRAP)
    (tmp_path / "conf").mkdir()
    text = "# @package _global_\nhydra: {callbacks: {sly: {_target_: trap.Part}}}\n"
    (tmp_path / "conf" / "sly.yaml").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    for words in ((), ("-m", "seed=0,1")):
        ran = app("--config-dir", "conf", "+sly@_global_=sly", "model=mlp", *words)
        ran = ran if ran.code == 2 else app("--config-dir", "conf", "+experiment=sly", *words)
        assert ran.code == 2
        assert "Traceback" not in ran.err
    assert before == sorted(tmp_path.rglob("*"))


def test_a_pickle_is_not_run_again(app: Callable[..., Ran]) -> None:
    ran = app("--experimental-rerun", "config.pickle")
    assert ran.code == 2
    assert "would run the code in a pickle" in ran.err


# ---- too big, too deep, without end


LAUGHS = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
DOUBLES = "".join(f"x{n}: '${{x{n + 1}}}${{x{n + 1}}}'\n" for n in range(60)) + "x60: ha\n"
LISTS = "".join(f"x{n}: ['${{x{n + 1}}}', '${{x{n + 1}}}']\n" for n in range(60)) + "x60: []\n"
KEYS = "one: a\nx0: '${t.${one}}${t.${one}}'\nt: {a: '${x1}'}\n" + "".join(
    f"x{n}: '${{x{n + 1}}}${{x{n + 1}}}'\n" for n in range(1, 60)
)
TOO_MUCH = {
    "laughs": (LAUGHS, "holds more than 20,000 values"),
    "deep": ("x: " + "[" * 10_000 + "]" * 10_000, "inside one another"),
    "deep groups": ("x: " + "{a: " * 10_000 + "}" * 10_000, "inside one another"),
    "deep aliases": (
        "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 200)),
        "inside one another",
    ),
    "alias of itself": ("x: &x [*x]", "stands inside what it repeats"),
    "long": ("x: " + "y" * 1_100_000, "bytes; allowed: 1,000,000"),
    "many": ("x: [" + "1, " * 30_000 + "]", "holds more than 20,000 values"),
    "no yaml": ("x: [1", "cannot be read"),
    "no text": ("x: \0", "cannot be read"),
    "python": ("x: !!python/object/apply:os.system [touch sprung]", "cannot be read"),
    "big number": ("x: " + "9" * 10_000, "cannot be read"),
    "doubles": (DOUBLES, "would become more than 1,000,000 characters"),
    "lists": (LISTS, "would become more than 1,000,000 characters"),
    "keys": (KEYS, "would become more than 1,000,000 characters"),
    "cycle": ("x: '${y}'\ny: '${x}'", "is made of itself"),
    "cycle of groups": ("x: {y: '${x}'}", "is made of itself"),
    "cycle of relatives": ("x: {y: {z: '${..y}'}}", "is made of itself"),
    "chain": (
        "".join(f"x{n}: '${{x{n + 1}}}'\n" for n in range(500)) + "x500: 1\n",
        f"more than {DEEPEST} times",
    ),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_a_file_that_is_too_much_is_named(stranger: Path, case: str) -> None:
    text, said = TOO_MUCH[case]
    found = refused(stranger, text)
    assert said in found
    assert len(found.splitlines()) == 1
    assert len(found) < 1_000


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("x=" + "[" * 10_000, "allowed: 10,000"),
        ("x=" + "[" * 1_000, "opens more than 64 brackets"),
        ("x=" + "{a:" * 1_000, "opens more than 64 brackets"),
        ("x=" + "${" * 1_000, "opens more than 64 brackets"),
        ("x=" + "y" * 100_000, "has 100,002 characters; allowed: 10,000"),
    ],
)
def test_a_word_that_is_too_much_is_named(word: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        mistakes_in(word)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize("words", [("--cfg", "job", "--resolve"), ("--help",), ()])
def test_the_command_ends_at_once(
    app: Callable[..., Ran], tmp_path: Path, words: tuple[str, ...]
) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "sly.yaml").write_text(f"# @package _global_\n{DOUBLES}")
    ran = app("--config-dir", "conf", "experiment=sly", *words)
    assert ran.code == 2
    assert "would become more than 1,000,000 characters" in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "outputs").exists()


def test_what_is_long_but_bearable_is_read(stranger: Path) -> None:
    names = ", ".join(f"a{n}" for n in range(2_000))
    text = (
        f"# @package _global_\ntags: [{names}]\nnotes: '{'x' * 20_000} ${{seed}} ${{data.name}}'\n"
    )
    path = stranger / "conf" / "experiment" / "fine.yaml"
    path.parent.mkdir()
    path.write_text(text)
    assert mistakes_in("--config-dir", "conf", "experiment=fine") == []


# ---- the folder of a stranger's sweep


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of one job."""
    cwd = tmp_path_factory.mktemp("ended")
    with pytest.MonkeyPatch.context() as patch:
        assert in_this_process(cwd, patch)("seed=0", "trainer.max_epochs=1") == 0
    return folder_of(cwd)


@pytest.fixture
def swept(ended: Path, tmp_path: Path) -> Path:
    """The same, whose job is to run again."""
    folder = Path(shutil.copytree(ended, tmp_path / "swept"))
    (job,) = (path for path in folder.iterdir() if path.name.startswith("0_"))
    shutil.rmtree(job)
    return folder


def changed(folder: Path, name: str, change: Callable[[str], str]) -> None:
    (path,) = (folder / ".sweep").glob(name)
    path.write_text(change(path.read_text()))


def with_word(word: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        content = json.loads(text)
        content["words"].append(word)
        content["jobs"][0]["words"].append(word)
        return json.dumps(content)

    return change


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("sweep.json", with_word("trusted_targets=[os]"), "begun with trusted_targets=[os]"),
        ("sweep.json", with_word("+hydra.job.env_set.A=b"), "begun with +hydra.job.env_set.A=b"),
        ("sweep.json", with_word("hydra.searchpath=[pkg://a]"), "begun with hydra.searchpath"),
        ("sweep.json", lambda text: text.replace('"folder": "', '"folder": "../../'), "no folder"),
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
        ("conf/*/config.yaml", lambda text: f"{text}\nbomb: {'[' * 500}", "inside one another"),
    ],
)
def test_a_strangers_sweep_is_refused(
    swept: Path,
    sweep: Sweeps,
    capfd: pytest.CaptureFixture[str],
    name: str,
    change: Callable[[str], str],
    said: str,
) -> None:
    changed(swept, name, change)
    before = sorted(swept.rglob("*"))
    capfd.readouterr()
    assert sweep(f"sweep.resume={swept}", short=False) == 2
    err = capfd.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert before == sorted(swept.rglob("*"))


def test_ones_own_sweep_goes_on(swept: Path, sweep: Sweeps) -> None:
    changed(swept, "sweep.json", with_word("trusted_targets=[sweep_task]"))
    words = (f"sweep.resume={swept}", "trusted_targets=[sweep_task]")
    assert sweep(*words, short=False) == 0
