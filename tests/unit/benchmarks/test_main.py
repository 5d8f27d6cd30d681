"""Discovery of the benchmarks, and the tables of a page."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import FOLDER, find_benchmarks, main, update_page
from benchmarks.tables import Table

NO_BENCHMARKS = {"__init__", "__main__", "peer_loops", "tables"}


def test_find_benchmarks_finds_every_module_with_a_main_function() -> None:
    assert {*find_benchmarks(FOLDER)} == {path.stem for path in FOLDER.glob("*.py")} - NO_BENCHMARKS


@pytest.mark.parametrize("name", sorted(find_benchmarks(FOLDER)))
def test_each_benchmark_publishes_tables(name: str) -> None:
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert "add_output_option(parser)" in source
    assert "publish(" in source


def test_quick_options_are_those_of_the_module() -> None:
    assert find_benchmarks(FOLDER)["startup"].quick == ("--rounds", "1")


def test_main_with_an_unknown_name_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["startupp"])
    assert "no benchmark is called startupp; there are " in capsys.readouterr().err


def test_update_page_replaces_only_tables_that_were_measured(tmp_path: Path) -> None:
    page, out = tmp_path / "page.md", tmp_path / "out"
    out.mkdir()
    (out / "new.md").write_text(Table("new", "A title", [{"value": 2}], ["A note."]).markdown())
    page.write_text(
        "Text.\n<!-- table new -->\nold\n<!-- end of table -->\n"
        "More.\n<!-- table other -->\nkept\n<!-- end of table -->\n"
    )
    assert update_page(page, out) == ["new"]
    assert page.read_text() == (
        "Text.\n<!-- table new -->\n| value |\n| --- |\n| 2 |\n\nA note.\n<!-- end of table -->\n"
        "More.\n<!-- table other -->\nkept\n<!-- end of table -->\n"
    )
