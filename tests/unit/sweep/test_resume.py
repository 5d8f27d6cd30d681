"""What `sweep.resume` takes from the folder of a sweep, and what must be typed again."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

from app.runtime.errors import ConfigError
from app.sweep.folder import SweepFolder
from app.sweep.resume import use_saved_command


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    folder = SweepFolder(tmp_path / "first")
    folder.overrides = ["seed=0,1", "data=csv", "hydra/launcher=pool", "hydra.launcher.slots=2"]
    folder.config_name = "main"
    for name in ("main", "command-line"):
        (folder.state_folder / "conf" / name).mkdir(parents=True)
    data = {"path": "/a/b.csv", "name": "/c", "source": {"train": {"path": "/a/b.csv"}}}
    folder.save_base({"data": data, "trainer": {"path": "/d"}})
    folder.save()
    return folder


def complete(*arguments: str) -> tuple[list[str], list[str | None]]:
    """Return the overrides and the configuration flags of a completed command line."""
    args = get_args_parser().parse_args(["-m", *arguments])
    use_saved_command(args)
    return args.overrides, [args.config_path, args.config_dir, args.config_name]


def test_use_saved_command_adds_overrides_and_copied_files(folder: SweepFolder) -> None:
    resume, conf = f"sweep.resume={folder.path}", folder.state_folder / "conf"
    frozen = [str(conf / "main"), str(conf / "command-line"), "main"]
    assert complete(resume) == ([resume, *folder.overrides], frozen)
    assert complete(resume, "hydra/launcher=joblib") == (
        [resume, "hydra/launcher=joblib", "seed=0,1", "data=csv"],
        frozen,
    )
    added = "+hydra.launcher.ray.init._temp_dir=/a"  # as an error may have asked to repeat it
    assert complete(resume, added)[0] == [resume, added, *folder.overrides]
    assert complete(resume, "seed=0,1,2") == ([resume, "seed=0,1,2"], frozen)
    forced = [resume, "sweep.force=true"]
    assert complete(*forced) == ([*forced, *folder.overrides], [None, None, None])
    flags = ("--config-dir", "mine")
    assert complete(*flags, resume)[1] == [None, "mine", None]
    assert complete("seed=0,1") == (["seed=0,1"], [None, None, None])


def test_use_saved_command_keeps_data_paths_of_other_working_folder(folder: SweepFolder) -> None:
    resume = f"sweep.resume={folder.path}"
    folder.working_folder = "/elsewhere"
    folder.save()
    paths = ["data.path='/a/b.csv'", "data.source.train.path='/a/b.csv'"]
    assert complete(resume)[0] == [resume, *folder.overrides, *paths]
    folder.overrides = ["data=csv,npz"]  # whose keys differ
    folder.save()
    assert complete(resume)[0] == [resume, "data=csv,npz"]


@pytest.mark.parametrize(
    "override",
    [
        "hydra.job.env_set.LD_PRELOAD=a.so",
        "+hydra.job={env_set: {LD_PRELOAD: a.so}}",
        "hydra={job: {env_set: {LD_PRELOAD: a.so}}}",
        "hydra.job_logging.handlers.file.filename=/a",
        "++hydra.searchpath=[pkg://a]",
        "hydra.sweep.dir=/a",
        "hydra.sweeper.storage='sqlite:////a.db'",
        "hydra.sweeper={storage: 'sqlite:////a.db'}",
        "sweep.trial={storage: 'sqlite:////a.db'}",
        "+sweep={trial: {storage: 'sqlite:////a.db'}}",
        "trusted_targets=[os]",
        "+trusted_targets=[os]",
    ],
)
def test_use_saved_command_does_not_trust_file(
    folder: SweepFolder, override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.overrides = [override]
    folder.save()
    resume = f"sweep.resume={folder.path}"
    with pytest.raises(ConfigError) as error:
        complete(resume)
    assert f"the sweep was started with {override}; repeat it" in str(error.value)
    monkeypatch.setenv("APP_TRUSTED_TARGETS", "os")
    if "trusted_targets" in override:
        assert complete(resume)[0] == [resume, override]
