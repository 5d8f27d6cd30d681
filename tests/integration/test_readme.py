"""What README tells users to write works as it stands there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.runs import Ran, mistakes_in

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def section(title: str) -> str:
    found = re.search(rf"^### {title}\n(.*?)(?=^##)", README, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


def words_of(command: str) -> list[str]:
    words = shlex.split(command, comments=True)
    assert words[:3] == ["python", "-m", "app"]
    return words[3:]


@pytest.mark.parametrize("title", ["A model", "A dataset", "A task", "A metric", "A callback"])
def test_adding_ones_own(title: str, app: Callable[..., Ran], tmp_path: Path) -> None:
    command = None
    for language, content in BLOCK.findall(section(title)):
        if language == "bash":
            command = content
            continue
        path = tmp_path / content.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert command
    ran = app(*words_of(command), "debug=fast")
    assert ran.code == 0, ran.err
    if title == "A metric":
        assert "kappa" in ran.csv("epoch_details/epoch001_valid.csv")
    if title == "A callback":
        assert "valid 1 took" in ran.out


def test_the_lines_for_python_run(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(
        r"^## From Python\n+```python\n(.*?)```", README, re.DOTALL | re.MULTILINE
    )
    exec(block.replace('"trainer.max_epochs=1"', '"debug=fast"'))
    assert "probability_9" in capsys.readouterr().out.replace("...", "probability_9")
    assert len(list((elsewhere / "outputs").glob("*/*/model.pt"))) == 1


def test_the_loss_of_readme_composes(elsewhere: Path) -> None:
    (block,) = re.findall(r"```yaml\n# conf/loss/my_loss.yaml\n(.*?)```", README, re.DOTALL)
    (elsewhere / "conf" / "loss").mkdir(parents=True)
    (elsewhere / "conf" / "loss" / "my_loss.yaml").write_text(block)
    assert not mistakes_in("--config-dir", "conf", "loss=my_loss")


def test_the_rows_of_the_table_of_options_are_without_mistakes() -> None:
    table = README.partition("| to | write |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| [^|]+ \| `(.+)` \|$", table, re.MULTILINE)
    assert len(rows) > 8
    for row in rows:
        assert not mistakes_in(*shlex.split(row)), row


def test_the_goals_of_readme_are_without_mistakes() -> None:
    goals = [c for c in README.splitlines() if c.startswith("python -m app goal.")]
    assert len(goals) == 2
    for command in goals:
        assert not mistakes_in(*words_of(command)), command


def test_the_mistakes_shown_are_those_found() -> None:
    shown = README.partition("$ python -m app ")[2].partition("```")[0].splitlines()
    found = mistakes_in(*shown[0].split())
    assert shown[1] == f"{len(found)} mistakes in the configuration:"
    for line, mistake in zip(shown[2:], found, strict=True):
        start, _, end = line.strip().partition("...")
        assert mistake.startswith(start)
        assert mistake.endswith(end)
