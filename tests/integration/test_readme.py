"""The commands and code blocks of README.md work as they are written there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.runs import RunResult, config_issues

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def section(title: str) -> str:
    match = re.search(rf"^### {title}\n(.*?)(?=^##)", README, re.DOTALL | re.MULTILINE)
    assert match, title
    return match[1]


def arguments_of(command: str) -> list[str]:
    arguments = shlex.split(command, comments=True)
    assert arguments[:3] == ["python", "-m", "app"]
    return arguments[3:]


@pytest.mark.parametrize("title", ["A model", "A dataset", "A task", "A metric", "A callback"])
def test_readme_example_of_own_component_trains(
    title: str, app: Callable[..., RunResult], tmp_path: Path
) -> None:
    command = None
    for language, content in BLOCK.findall(section(title)):
        if language == "bash":
            command = content
            continue
        path = tmp_path / content.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert command
    result = app(*arguments_of(command), "debug=fast", "~callbacks.plots")
    assert result.code == 0, result.err
    if title == "A metric":
        assert "kappa" in result.csv("epoch_details/epoch001_valid.csv")
    if title == "A callback":
        assert "valid 1 took" in result.out


def test_readme_python_example_runs(tmp_cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(
        r"^## From Python\n+```python\n(.*?)```", README, re.DOTALL | re.MULTILINE
    )
    exec(block.replace('"trainer.max_epochs=1"', '"debug=fast", "~callbacks.plots"'))
    assert "probability_9" in capsys.readouterr().out.replace("...", "probability_9")
    assert len(list((tmp_cwd / "outputs").glob("*/*/model.pt"))) == 1


def test_readme_loss_composes(tmp_cwd: Path) -> None:
    (block,) = re.findall(r"```yaml\n# conf/loss/my_loss.yaml\n(.*?)```", README, re.DOTALL)
    (tmp_cwd / "conf" / "loss").mkdir(parents=True)
    (tmp_cwd / "conf" / "loss" / "my_loss.yaml").write_text(block)
    assert not config_issues("--config-dir", "conf", "loss=my_loss")


def test_readme_table_of_options_has_no_config_errors(trained_run: RunResult) -> None:
    table = README.partition("| to | write |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| [^|]+ \| `(.+)` \|$", table, re.MULTILINE)
    assert len(rows) > 8
    for row in rows:
        typed = row.replace("RUN", str(trained_run.folder))
        assert not config_issues(*shlex.split(typed)), row


def test_readme_goals_have_no_config_errors() -> None:
    commands = [c for c in README.splitlines() if c.startswith("python -m app goal.")]
    assert len(commands) == 2
    for command in commands:
        assert not config_issues(*arguments_of(command)), command


def test_readme_shows_the_config_errors_that_are_found() -> None:
    shown = README.partition("$ python -m app ")[2].partition("```")[0].splitlines()
    issues = config_issues(*shown[0].split())
    assert shown[1] == f"{len(issues)} errors in the configuration:"
    for line, issue in zip(shown[2:], issues, strict=True):
        start, _, end = line.strip().partition("...")
        assert issue.startswith(start)
        assert issue.endswith(end)
