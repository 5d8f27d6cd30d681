"""Whatever is typed or written in a file: a job or a clear error, and nothing else happens."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.cli.preflight import preflight
from app.config import resolvers
from app.config.compose import CONF
from app.runtime.errors import UserError

SHORT = settings(
    max_examples=25,
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
likely = st.builds(
    "{}{}={}".format, st.sampled_from(PREFIXES), st.sampled_from(KEYS), st.sampled_from(VALUES)
)
words = st.lists(
    likely
    | likely
    | likely
    | st.builds("{}{}={}".format, st.sampled_from(PREFIXES), keys, values)
    | st.builds("~{}".format, keys)
    | st.text(max_size=12).filter(lambda text: not text.startswith("-")),
    min_size=1,
    max_size=2,
)


@st.composite
def files(draw: st.DrawFn) -> tuple[str, str]:
    """The name of a configuration file, and its text with something changed."""
    path = draw(st.sampled_from(FILES))
    lines = path.read_text().splitlines()
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(lines) - 1)) if lines else 0
        how = draw(st.sampled_from(("cut", "value", "add", "text")))
        if how == "cut" and lines:
            del lines[place]
        elif how == "value" and lines:
            lines[place] = f"{lines[place].partition(':')[0]}: {draw(values)}"
        elif how == "add":
            lines.insert(place, f"{draw(keys)}: {draw(values)}")
        else:
            lines.insert(place, draw(st.text(max_size=20)))
    return str(path.relative_to(CONF)), "\n".join(lines)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a module would leave a file if it were imported."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "trap").mkdir()
    code = "from pathlib import Path\nPath(__file__).with_name('was_here').touch()\n"
    (folder / "trap" / "__init__.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.delenv("APP_TRUSTED_TARGETS", raising=False)
        yield folder


def composed(place: Path, *typed: str) -> None:
    """Composes and checks, which must do nothing else."""
    resolvers.register()
    with chdir(place):
        before = sorted(place.rglob("*"))
        try:
            preflight(get_args_parser().parse_args(list(typed)))
        except (UserError, SystemExit) as error:
            assert not isinstance(error, UserError) or str(error)
        assert sorted(place.rglob("*")) == before


def of_words(place: Path, typed: list[str]) -> None:
    flags = ["-m"] if len(typed) == 2 else []
    composed(place, *flags, "--", "model=mlp", *typed)


def of_file(place: Path, file: tuple[str, str]) -> None:
    name, text = file
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        group, _, option = name.removesuffix(".yaml").rpartition("/")
        chosen = [f"{group}={option}"] if group in OPEN else []
        flags = ["--config-path", folder] if name == "config.yaml" else ["--config-dir", folder]
        composed(place, *flags, *chosen)


OPEN = ("model", "data", "optimizer", "scheduler", "loss", "metric", "experiment", "trainer")


@SHORT
@given(typed=words)
def test_whatever_is_typed(place: Path, typed: list[str]) -> None:
    of_words(place, typed)


@SHORT
@given(file=files())
def test_whatever_is_in_a_file(place: Path, file: tuple[str, str]) -> None:
    of_file(place, file)


@pytest.mark.long
@pytest.mark.timeout(3_000)
@LONG
@given(typed=words)
def test_whatever_is_typed_at_length(place: Path, typed: list[str]) -> None:
    of_words(place, typed)


@pytest.mark.long
@pytest.mark.timeout(3_000)
@LONG
@given(file=files())
def test_whatever_is_in_a_file_at_length(place: Path, file: tuple[str, str]) -> None:
    of_file(place, file)
