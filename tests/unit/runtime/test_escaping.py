"""Control characters in texts of any origin are shown escaped."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pandas as pd
import pytest

from app.runtime.escaping import EscapedRecord, escape_control, escape_log_records, print_error
from app.sweep.report.page import render_page
from app.sweep.report.table import Results

HOSTILE = "a\x1b[31mb\rc\x07d\u202ee\x9bf\u2028g\ufeffh\udcffi"
SHOWN = r"a\x1b[31mb\rc\x07d\u202ee\x9bf\u2028g\ufeffh\udcffi"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What a plain handler of the root logger writes while records are escaped."""
    factory, root, text = logging.getLogRecordFactory(), logging.getLogger(), io.StringIO()
    handler = logging.StreamHandler(text)
    root.addHandler(handler)
    escape_log_records()
    yield text
    root.removeHandler(handler)
    logging.setLogRecordFactory(factory)


def test_escape_control_shows_controls_and_keeps_text() -> None:
    assert escape_control(HOSTILE) == SHOWN
    plain = "é汉字 👨\u200d👩\u200d👧 two\nlines\tand \\x1b"
    assert escape_control(plain) == plain


def test_escape_log_records_escapes_messages_arguments_and_tracebacks(stream: io.StringIO) -> None:
    log = logging.getLogger("someone.else")
    log.warning("name %s", HOSTILE)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log.exception(HOSTILE)
    assert stream.getvalue().count(SHOWN) == 3
    assert "Traceback" in stream.getvalue()
    assert not set(HOSTILE) & set(stream.getvalue()) - set(SHOWN)


def test_escaped_record_keeps_its_arguments() -> None:
    record = EscapedRecord("a", logging.INFO, "a.py", 1, "%s", (HOSTILE,), None)
    assert record.args == (HOSTILE,)


def test_print_error_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(ValueError(HOSTILE))
    assert capsys.readouterr().err == f"{SHOWN}\n"


def test_render_page_escapes_texts_and_links_to_the_real_folder() -> None:
    cell, shown = HOSTILE.partition("\ufeff")[0], SHOWN.partition(r"\ufeff")[0]
    table = pd.DataFrame([{"status": cell, cell: cell, "folder": "runs/é\x1b a"}])
    results = Results(HOSTILE, table, [cell], [], {})
    page = render_page(results, {HOSTILE: {"bars": [[HOSTILE, 0.5]]}})
    text = page.split('id="content">')[1].split("</script>")[0]
    content = json.loads(text)
    assert f"<title>{SHOWN}</title>" in page
    assert content["columns"] == ["status", shown, "folder"]
    assert content["rows"] == [[shown, shown, r"runs/é\x1b a"]]
    assert content["figures"] == {SHOWN: {"bars": [[SHOWN, 0.5]]}}
    assert content["links"] == ["./runs/%C3%A9%1B%20a"]
