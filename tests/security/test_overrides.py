"""Random overrides and configuration files give a job or a clear error, without side effects."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.cli.preflight import preflight
from app.config import resolvers
from app.config.compose import CONF, open_composer
from app.runtime.errors import UserError
from tests.support.runs import RunResult

SHORT = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
LONG = settings(SHORT, max_examples=1_000, derandomize=False)

FILES = sorted(path for path in CONF.rglob("*.yaml") if "sweep" not in path.parts)
KEYS = (
    *("model", "data", "optimizer", "metric@metric", "callbacks", "experiment", "seed", "name"),
    *("optimizer.lr", "model._target_", "model.num_classes", "model._args_", "model._partial_"),
    *("data.source.train", "data.augment", "data.split.valid", "loss.cross_entropy", "goal"),
    *("goal.metric", "trainer", "trainer.devices", "trainer.max_epochs", "freeze", "freeze.a"),
    *("sweep", "sweep.together", "sweep.trial", "checkpoint.monitors", "ckpt", "resume", "mode"),
    *("hydra.run.dir", "hydra.job.name", "hydra.job.env_set", "hydra.callbacks", "hydra.mode"),
    *("hydra.launcher", "hydra.launcher._target_", "hydra/launcher", "hydra/sweeper", "hydra"),
    *("hydra.job_logging", "hydra.searchpath", "hydra.output_subdir", "hydra.overrides.task"),
    *("hydra.job", "hydra.runtime", "hydra.sweeper.params", "trusted_targets", "average", "tags"),
    *("scheduler", "scheduler.lr_scheduler", "task", "hydra.verbose", "launch", "defaults"),
)
VALUES = (
    *("1", "-1", "0.1", "null", "true", "???", "nan", "inf", "[]", "{}", "''", "' '", "1e400"),
    *("mlp", "mnist", "os.system", "trap.Part", "torch.optim.SGD", "app.models.lenet.LeNet"),
    *("{_target_: trap.Part}", "[{_target_: os.system}]", "{_args_: [touch was_here]}"),
    *("{_target_: os.system, _args_: ['touch was_here']}", "torch.nn.Linear", "torch.nn"),
    *("${seed}", "${model}", "${nothing}", "${name}${name}", "${oc.env:HOME}", "${now:%S}"),
    *("${oc.decode:'{_target_: os.system}'}", "${hydra:runtime.cwd}", "${or:1,2}", "${path:}"),
    *("${run_name:1}", "${image_part:1,2}", "${oc.select:model}", "${.lr}", "${..}", "${", "}"),
    *("pkg://trap", "[pkg://trap]", "[http://a]", "file:///", "[conf]", "../../a", "/", "~"),
    *("1,2", "range(3)", "choice(1,2)", "interval(0,1)", "glob(*)", "glob(", "a b", "a=b", "'"),
    *("\u200b", "日本", "\U0001f600", "\\", '"', "#", "&a", "*a", "!!python/name:os.system", "@"),
)
PREFIXES = ("", "", "", "+", "++", "~")
GROUPS = ("model", "data", "optimizer", "scheduler", "loss", "metric", "experiment", "trainer")

trees = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.sampled_from(VALUES),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(("_target_", "_args_", "a", "lr", "${a}", "1")), inner)
    ),
    max_leaves=5,
)
keys = (
    st.sampled_from(KEYS)
    | st.text(max_size=8)
    | st.tuples(st.sampled_from(KEYS), st.sampled_from(("a", "_target_", "0", "lr", "train"))).map(
        ".".join
    )
)
values = st.sampled_from(VALUES) | st.text(max_size=12) | trees.map(str)
known_key_overrides = st.builds(
    "{}{}={}".format, st.sampled_from(PREFIXES), st.sampled_from(KEYS), st.sampled_from(VALUES)
)
override_lists = st.lists(
    known_key_overrides
    | known_key_overrides
    | known_key_overrides
    | st.builds("{}{}={}".format, st.sampled_from(PREFIXES), keys, values)
    | st.builds("~{}".format, keys)
    | st.text(max_size=12).filter(lambda text: not text.startswith("-")),
    min_size=1,
    max_size=2,
)


@st.composite
def changed_files(draw: st.DrawFn) -> tuple[str, str]:
    """Return the name of a configuration file, and its text with random changes."""
    path = draw(st.sampled_from(FILES))
    lines = path.read_text().splitlines()
    for _ in range(draw(st.integers(1, 3))):
        index = draw(st.integers(0, len(lines) - 1)) if lines else 0
        change = draw(st.sampled_from(("delete", "value", "add", "text")))
        if change == "delete" and lines:
            del lines[index]
        elif change == "value" and lines:
            lines[index] = f"{lines[index].partition(':')[0]}: {draw(values)}"
        elif change == "add":
            lines.insert(index, f"{draw(keys)}: {draw(values)}")
        else:
            lines.insert(index, draw(st.text(max_size=20)))
    return str(path.relative_to(CONF)), "\n".join(lines)


@pytest.fixture(scope="module")
def marker_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with a package that creates a file when it is imported."""
    folder = tmp_path_factory.mktemp("marker")
    (folder / "trap").mkdir()
    code = "from pathlib import Path\nPath(__file__).with_name('was_here').touch()\n"
    (folder / "trap" / "__init__.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.delenv("APP_TRUSTED_TARGETS", raising=False)
        yield folder


def check_preflight(marker_dir: Path, *arguments: str) -> None:
    """Compose and validate, and check that no file was created or removed."""
    resolvers.register()
    with chdir(marker_dir):
        before = sorted(marker_dir.rglob("*"))
        try:
            with open_composer(get_args_parser().parse_args(list(arguments))) as composer:
                preflight(composer)
        except (UserError, SystemExit) as error:
            assert not isinstance(error, UserError) or str(error)
        assert sorted(marker_dir.rglob("*")) == before


def check_overrides(marker_dir: Path, overrides: list[str]) -> None:
    flags = ["-m"] if len(overrides) == 2 else []
    check_preflight(marker_dir, *flags, "--", "model=mlp", *overrides)


def check_file(marker_dir: Path, file: tuple[str, str]) -> None:
    name, text = file
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        group, _, option = name.removesuffix(".yaml").rpartition("/")
        selection = [f"{group}={option}"] if group in GROUPS else []
        flags = ["--config-path", folder] if name == "config.yaml" else ["--config-dir", folder]
        check_preflight(marker_dir, *flags, *selection)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("-m", "seed=0", "hydra.sweep.subdir=${hydra.job.num}"),
            "hydra.sweep.subdir=${hydra.job.num}: this sweeper names the job folders itself",
        ),
        (
            ("hydra.job_logging.handlers.file.filename=${hydra.run.dir}.${hydra.job.id}",),
            "hydra.job_logging.handlers.file.filename does not resolve: ",
        ),
    ],
)
def test_command_with_value_that_only_a_sweep_job_has_is_refused_in_one_line(
    app: Callable[..., RunResult], arguments: tuple[str, ...], message: str
) -> None:
    ran = app(*arguments, "model=mlp")
    assert ran.code == 2
    assert message in ran.err
    assert "Traceback" not in ran.err


@SHORT
@given(overrides=override_lists)
def test_preflight_random_overrides_give_job_or_clear_error(
    marker_dir: Path, overrides: list[str]
) -> None:
    check_overrides(marker_dir, overrides)


@SHORT
@given(file=changed_files())
def test_preflight_random_file_gives_job_or_clear_error(
    marker_dir: Path, file: tuple[str, str]
) -> None:
    check_file(marker_dir, file)


@pytest.mark.long
@pytest.mark.timeout(3_000)
@LONG
@given(overrides=override_lists)
def test_preflight_many_random_overrides_give_job_or_clear_error(
    marker_dir: Path, overrides: list[str]
) -> None:
    check_overrides(marker_dir, overrides)


@pytest.mark.long
@pytest.mark.timeout(3_000)
@LONG
@given(file=changed_files())
def test_preflight_many_random_files_give_job_or_clear_error(
    marker_dir: Path, file: tuple[str, str]
) -> None:
    check_file(marker_dir, file)
