"""The page of a sweep in a real browser, and its plots."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from app.config.schema import MonitorConfig
from app.sweep.report.page import Figure, render_page
from app.sweep.report.plots import axis_scale, make_plots
from app.sweep.report.table import Curves, Results

HOSTILE = '</script><img src=x onerror="window.hacked=1"><script>window.hacked=2</script>\'&amp;'
ACCURACY = MonitorConfig("accuracy", "max")
QUIET_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
)
NO_SYNC_FLAGS = "--disable-component-update --disable-sync"
Show = Callable[..., Any]


def curves(*accuracies: float) -> Curves:
    """Return the summary table of a run with these validation accuracies."""
    epochs = [float(epoch) for epoch in range(1, len(accuracies) + 1)]
    losses = [1 - value for value in accuracies]
    columns = {"epoch": epochs, "loss": losses, "accuracy": list(accuracies)}
    return {"train": columns, "valid": columns}


def run(job: int, status: str, best: float | None, **swept: object) -> dict[str, object]:
    """Return a row of the table."""
    measured = {"best_accuracy": best, "seconds": 12.3456, "peak_memory_bytes": 2**30}
    return {"job": job, "status": status, **swept, **measured, "folder": f"runs/{job}"}


def results(*runs: dict[str, object], keys: tuple[str, ...] = ("optimizer.lr", "model")) -> Results:
    """Return the results of a sweep; runs with a best value have curves of two epochs."""
    drawn = {
        str(each["folder"]): curves(best / 2, best)
        for each in runs
        if isinstance(best := each["best_accuracy"], float) and math.isfinite(best)
    }
    return Results("a sweep", pd.DataFrame(list(runs)), list(keys), [ACCURACY], drawn)


SWEEP = results(
    run(0, "completed", 0.9, **{"optimizer.lr": 0.001, "model": "mlp"}),
    run(1, "failed", None, **{"optimizer.lr": 0.01, "model": "mlp"}),
    run(2, "completed", 0.98, **{"optimizer.lr": 0.1, "model": "cnn"}),
    run(10, "pruned", 0.7, **{"optimizer.lr": 0.01, "model": "cnn"}),
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip("Chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        arguments = f"{QUIET_FLAGS} {NO_SYNC_FLAGS}".split()
        browser = playwright.chromium.launch(executable_path=executable, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def show(chromium: Any, tmp_path: Path) -> Iterator[Show]:
    """Open pages in the browser; finally check that they loaded and logged nothing."""
    file = tmp_path / "page.html"
    tab = chromium.new_page(viewport={"width": 1200, "height": 900})
    tab.set_default_timeout(20_000)
    requests: list[str] = []
    messages: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))

    def show_page(results: Results, **figures: Figure) -> Any:
        file.write_text(render_page(results, figures), encoding="utf-8")
        tab.goto(file.as_uri())
        return tab

    yield show_page
    tab.wait_for_timeout(200)
    tab.close()
    assert requests == [file.as_uri()]
    assert messages == []


def column(tab: Any, name: str) -> list[str]:
    """Return the texts of a column in the visible rows, from the top."""
    names = tab.locator("#table th").evaluate_all("all => all.map(each => each.dataset.column)")
    cells = f"#table tbody tr:not([hidden]) td:nth-child({names.index(name) + 1})"
    texts: list[str] = tab.locator(cells).all_inner_texts()
    return texts


def header(tab: Any, name: str) -> Any:
    return tab.locator(f'#table th[data-column="{name}"]')


def visible(tab: Any) -> list[str]:
    """Return the names of the runs with visible curves, in drawing order."""
    script = "node => node.plot.series.map(each => each.label.split(',')[0])"
    names: list[str] = tab.locator("#curves").evaluate(script)
    return names


def values(tab: Any, plot: str, axis: str) -> list[Any]:
    """Return the values on an axis of all points of a plot, series by series."""
    script = f"node => node.plot.series.flatMap(each => each.{axis})"
    found: list[Any] = tab.locator(plot).evaluate(script)
    return found


def hover(tab: Any, symbols: Any) -> str:
    """Move the mouse to the first of the symbols of a series, and return the hover text."""
    x, y = symbols.evaluate(
        """(path) => {
          path.scrollIntoView({ block: "center" });
          const { x, y } = path.getPointAtLength(0).matrixTransform(path.getScreenCTM());
          return [x, y];
        }"""
    )
    tab.mouse.move(x, y)
    text: str = tab.locator(".hover:not([hidden])").inner_text()
    return text


def test_page_goal_max_highest_run_is_first(show: Show) -> None:
    tab = show(SWEEP)
    assert column(tab, "job") == ["2", "0", "10", "1"]
    assert column(tab, "best_accuracy") == ["0.9800", "0.9000", "0.7000", ""]
    assert "job=2, optimizer.lr=0.1, model=cnn" in tab.locator("#best").inner_text()
    assert tab.locator("#counts").inner_text().split("\n") == [
        "4 runs", "2 completed", "1 failed", "1 pruned",
    ]  # fmt: skip
    assert column(tab, "peak_memory_bytes")[0] == "1 GiB"
    assert tab.locator("#table td[title='12.3456']").count() == 4
    assert tab.locator("#table td a").first.get_attribute("href") == "./runs/2"


def test_page_goal_min_lowest_run_is_first(show: Show) -> None:
    low = Results(
        SWEEP.title, SWEEP.table, SWEEP.keys, [MonitorConfig("accuracy", "min")], SWEEP.curves
    )
    tab = show(low)
    assert column(tab, "job") == ["10", "0", "2", "1"]
    assert "job=10," in tab.locator("#best").inner_text()


def test_page_sort_both_directions_missing_values_last(show: Show) -> None:
    tab = show(SWEEP)
    assert header(tab, "best_accuracy").get_attribute("aria-sort") == "descending"
    header(tab, "best_accuracy").locator("button").click()
    assert column(tab, "best_accuracy") == ["0.7000", "0.9000", "0.9800", ""]
    assert header(tab, "best_accuracy").get_attribute("aria-sort") == "ascending"
    header(tab, "job").locator("button").click()
    assert column(tab, "job") == ["0", "1", "2", "10"]
    assert header(tab, "best_accuracy").get_attribute("aria-sort") == "none"
    header(tab, "job").locator("button").focus()
    tab.keyboard.press("Enter")
    assert column(tab, "job") == ["10", "2", "1", "0"]


def test_page_filter_hides_rows_and_points(show: Show) -> None:
    tab = show(SWEEP)
    for words, jobs in {
        "FAILED": ["1"],
        "status:prun": ["10"],
        "model=cnn": ["2", "10"],
        "model=cn": [],
        "lr=1e-2 model=mlp": ["1"],
        "runs/10": ["10"],
        "ValueError: x": [],
        "": ["2", "0", "10", "1"],
    }.items():
        tab.locator("#filter").fill(words)
        assert column(tab, "job") == jobs
        assert tab.locator("#shown").inner_text() == f"{len(jobs)} of 4"
        best = values(tab, "#scatter", "y") if tab.locator("#scatter").is_visible() else []
        assert len(best) == len([job for job in jobs if job != "1"])


def test_page_checkbox_toggles_curve_of_run(show: Show) -> None:
    tab = show(SWEEP)
    assert visible(tab) == ["job=10", "job=0", "job=2"]  # the best run last, on top
    tab.get_by_label("curve of job=0,").uncheck()
    assert visible(tab) == ["job=10", "job=2"]
    assert tab.get_by_label("curve of job=1,").is_disabled()
    tab.locator("#none").click()
    assert visible(tab) == []
    tab.locator("#filter").fill("cnn")
    tab.locator("#all").click()
    assert visible(tab) == ["job=10", "job=2"]


def test_page_many_runs_draws_ten_best_first(show: Show) -> None:
    many = [
        run(job, "completed", 0.5 + job / 100, **{"optimizer.lr": 0.1, "model": "mlp"})
        for job in range(15)
    ]
    tab = show(results(*many))
    best = [f"job={job}" for job in range(5, 15)]
    assert visible(tab) == best
    tab.locator("#all").click()
    assert len(visible(tab)) == 15
    tab.locator("#best10").click()
    assert visible(tab) == best


def test_page_select_quantity_redraws_curves(show: Show) -> None:
    tab = show(SWEEP)
    assert tab.locator("#quantity").input_value() == "valid/accuracy"
    assert tab.locator("#curves .title.y").text_content() == "valid/accuracy"
    options = tab.locator("#quantity option").all_inner_texts()
    assert options == ["train/loss", "train/accuracy", "valid/loss", "valid/accuracy"]
    tab.locator("#quantity").select_option("train/loss")
    assert tab.locator("#curves .title.y").text_content() == "train/loss"
    last = tab.locator("#curves").evaluate("node => node.plot.series.at(-1).y")
    assert last == pytest.approx([0.51, 0.02], abs=1e-6)  # six digits


def test_page_epoch_axis_has_integer_ticks(show: Show) -> None:
    tab = show(SWEEP)
    assert tab.locator("#curves .tick.x").all_text_contents() == ["1", "2"]


def test_page_hover_shows_run_and_value(show: Show) -> None:
    tab = show(SWEEP)
    assert hover(tab, tab.locator("#curves .circle").last).split("\n") == [
        "job=2, optimizer.lr=0.1, model=cnn", "epoch: 1", "valid/accuracy: 0.49",
    ]  # fmt: skip
    best = hover(tab, tab.locator("#scatter .star"))
    assert best == "job=2, optimizer.lr=0.1, model=cnn\noptimizer.lr: 0.1\nbest accuracy: 0.98"
    tab.mouse.move(1, 1)
    assert not tab.locator(".hover:not([hidden])").is_visible()


def test_page_drag_zooms_and_double_click_shows_everything(show: Show) -> None:
    tab = show(SWEEP)
    tab.locator("#curves").scroll_into_view_if_needed()
    box = tab.locator("#curves svg svg").bounding_box()
    center = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(*center)
    tab.mouse.down()
    tab.mouse.move(center[0] + 90, center[1] + 90)
    tab.mouse.up()
    ticks = tab.locator("#curves .tick.y").all_text_contents()
    assert all(0.35 < float(tick) < 0.7 for tick in ticks)
    assert tab.locator("#curves .tick.x").all_text_contents() == []
    tab.locator("#none").click()
    assert tab.locator("#curves .tick.y").all_text_contents() == ticks  # another selection
    tab.locator("#all").click()
    tab.mouse.dblclick(*center)
    assert tab.locator("#curves .tick.x").all_text_contents() == ["1", "2"]


def test_page_key_axes_match_scales_of_values(show: Show) -> None:
    tab = show(SWEEP)
    scale = "node => node.plot.x.scale"
    assert tab.locator("#scatter").evaluate(scale) == "log"
    assert values(tab, "#scatter", "x") == [0.001, 0.01, 0.1]  # not completed, best
    assert tab.locator("#scatter .tick.x").all_text_contents() == ["0.001", "0.1", "0.01"]
    tab.locator("#key").select_option("model")
    assert tab.locator("#scatter").evaluate(scale) == "category"
    assert values(tab, "#scatter", "x") == ["mlp", "cnn", "cnn"]
    assert tab.locator("#scatter .tick.x").all_text_contents() == ["mlp", "cnn"]
    # Worst run first; heights on the axes of the keys and the metric, from 0 to 1.
    lines = tab.locator("#parallel").evaluate("node => node.plot.series.map(each => each.y)")
    assert lines == [
        [pytest.approx(0.5), 1, 0],
        [0, 0, pytest.approx(0.2 / 0.28)],
        [1, 1, 1],
    ]
    stroke = "lines => lines.map(line => getComputedStyle(line).stroke)"
    assert len(set(tab.locator("#parallel .line").evaluate_all(stroke))) == 3
    marks = tab.locator("#parallel").evaluate("node => node.plot.marks")
    names = tab.locator("#parallel .tick.x").all_text_contents()
    assert names == ["optimizer.lr", "model", "best accuracy"]
    texts = [[mark["text"] for mark in marks if mark["x"] == name] for name in names]
    assert texts[:2] == [["0.001", "0.1", "0.01"], ["mlp", "cnn"]]
    assert [texts[2][0], texts[2][-1]] == ["0.7000", "0.9800"]


def test_page_dark_mode_changes_plot_colors(show: Show) -> None:
    tab = show(SWEEP)
    shown = {"#curves .tick >> nth=0": "fill", "#parallel .line >> nth=0": "stroke"}
    colors = [
        tab.locator(part).evaluate(f"node => getComputedStyle(node).{kind}")
        for scheme in ("light", "dark")
        for part, kind in shown.items()
        if tab.emulate_media(color_scheme=scheme) is None
    ]
    assert len(set(colors)) == 4


def test_page_narrow_window_has_no_horizontal_scroll(show: Show) -> None:
    tab = show(SWEEP)
    tab.set_viewport_size({"width": 360, "height": 700})
    # Wait inside the page: its policy blocks `wait_for_function`.
    width = tab.locator("#curves svg").first.evaluate(
        """async (node) => {
          for (let frame = 0; node.clientWidth >= 360 && frame < 300; frame += 1)
            await new Promise(requestAnimationFrame);
          return node.clientWidth;
        }"""
    )
    assert width < 360
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360


def test_page_hostile_texts_are_shown_but_not_run(show: Show) -> None:
    line = run(0, HOSTILE, 0.9, **{HOSTILE: HOSTILE, "model": "mlp"}) | {"error": HOSTILE}
    line["folder"] = "javascript:window.hacked=3"
    other = run(1, "completed", 0.8, **{HOSTILE: "b", "model": "cnn"})
    swept = results(line, other, keys=(HOSTILE, "model"))
    swept.curves["javascript:window.hacked=3"][HOSTILE] = curves(0.5)["valid"]
    hostile = Results(HOSTILE, swept.table, swept.keys, [ACCURACY], swept.curves)
    figure = {"bars": [[HOSTILE, 0.5]]}
    tab = show(hostile, **{HOSTILE: figure})
    for link in tab.locator("main a, header a").all():
        assert link.evaluate("node => node.protocol") == "file:"
    tab.locator("#key").select_option("model")
    tab.locator("#filter").fill("<img")
    label = f"job=0, {HOSTILE}={HOSTILE}, model=mlp"
    assert hover(tab, tab.locator("#curves .circle").last).startswith(label)
    tab.wait_for_timeout(300)
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("img").count() == 0
    assert tab.title() == HOSTILE
    assert tab.locator("h1").inner_text() == HOSTILE
    assert tab.locator("#figures h3").inner_text() == HOSTILE
    assert column(tab, "error") == [HOSTILE]
    assert label in tab.locator("#curves .legend").text_content()
    assert HOSTILE in tab.locator("#figures .bars").text_content()
    assert HOSTILE[:10] in tab.locator("#parallel").text_content()
    assert f"{HOSTILE}/loss" in tab.locator("#quantity option").all_inner_texts()


def test_page_content_security_policy_blocks_scripts_and_requests(
    chromium: Any, tmp_path: Path
) -> None:
    (tmp_path / "page.html").write_text(render_page(SWEEP, {}), encoding="utf-8")
    tab = chromium.new_page()
    tab.goto((tmp_path / "page.html").as_uri())
    refused = tab.evaluate(
        """async () => {
          const refused = [];
          document.addEventListener("securitypolicyviolation",
            (event) => refused.push(event.effectiveDirective));
          const image = '<img src="https://localhost:9/x" onerror="window.hacked=1">';
          document.body.insertAdjacentHTML("beforeend", image);
          document.body.append(Object.assign(document.createElement("script"),
            { textContent: "window.hacked = 2" }));
          await fetch("https://localhost:9/x").catch(() => {});
          await new Promise((resolve) => setTimeout(resolve, 300));
          return refused;
        }"""
    )
    assert tab.evaluate("window.hacked") is None
    assert set(refused) == {"img-src", "script-src-elem", "script-src-attr", "connect-src"}
    tab.close()


def test_page_nan_and_infinity_are_missing_values(show: Show) -> None:
    keys = {"optimizer.lr": math.nan, "model": None}
    lines = [run(0, "completed", math.inf, **keys), run(1, "failed", math.nan, **keys)]
    swept = results(*lines, run(2, "completed", 0.5, **{"optimizer.lr": 0.1, "model": "mlp"}))
    swept.curves["runs/0"] = curves(0.1, math.nan, -math.inf)
    tab = show(swept)
    assert column(tab, "job")[0] == "2"
    assert column(tab, "best_accuracy") == ["0.5000", "", ""]
    tab.locator("#all").click()
    ys = tab.locator("#curves").evaluate("node => node.plot.series.map(each => each.y)")
    assert [0.1, None, None] in ys


@pytest.mark.parametrize("table", [pd.DataFrame(), SWEEP.table.iloc[:0]])
def test_page_empty_sweep_shows_notes(show: Show, table: pd.DataFrame) -> None:
    tab = show(Results("nothing", table, ["model"], [ACCURACY], {}))
    assert tab.locator("#table-note").is_visible()
    assert tab.locator("#curves-note").is_visible()
    assert tab.locator("#keys-note").is_visible()
    assert tab.locator(".plot svg").count() == 0


def test_page_runs_without_value_shows_notes(show: Show) -> None:
    tab = show(results(run(3, "pending", None, **{"optimizer.lr": 0.1, "model": "mlp"})))
    assert column(tab, "job") == ["3"]
    assert tab.locator("#curves-note").is_visible()
    assert tab.locator("#keys-note").is_visible()


def test_page_single_run_is_drawn(show: Show) -> None:
    tab = show(results(run(0, "running", 0.9, **{"optimizer.lr": 0.1, "model": "mlp"})))
    assert tab.locator("#counts").inner_text().startswith("1 run\n")
    assert visible(tab) == ["job=0"]
    assert tab.locator("#scatter .star").count() == 1
    assert not tab.locator("#keys-note").is_visible()


def test_page_several_goals_can_be_selected(show: Show) -> None:
    table = SWEEP.table.assign(**{"best_train/loss": [0.3, None, 0.2, 0.1]})
    goals = [ACCURACY, MonitorConfig("train/loss", "min")]
    tab = show(Results("two goals", table, SWEEP.keys, goals, SWEEP.curves))
    assert "job=10," in tab.locator("#best .card").nth(1).inner_text()
    tab.locator("#goal").select_option("train/loss")
    assert sorted(values(tab, "#scatter", "y")) == [0.1, 0.2, 0.3]


def test_page_without_goal_still_has_table(show: Show) -> None:
    tab = show(Results("no goal", SWEEP.table, SWEEP.keys, [], SWEEP.curves))
    assert column(tab, "job") == ["0", "1", "2", "10"]
    assert visible(tab) != []


def test_page_given_figures_are_drawn(show: Show) -> None:
    axes = {"x": {"scale": "linear"}, "y": {"scale": "log"}}
    dots = {
        "x": [0, 1, 2],
        "y": [0.1, 0.5, 0.7],
        "color": "red",
        "size": 8,
        "labels": ["a", "b", "c"],
    }
    coordinates = {
        "axes": [{"label": name, "scale": "linear", "values": [1, 2]} for name in ("lr", "loss")],
        "labels": ["one", "two"],
        "mode": "min",
    }
    figures = {
        "points": {**axes, "series": [dots]},
        "lines": coordinates,
        "bars": {"bars": [["lr", 0.9]]},
    }
    tab = show(SWEEP, **figures)
    assert tab.locator("#figures h3").all_inner_texts() == ["points", "lines", "bars"]
    assert tab.locator("#figures .circle").count() == 3
    assert tab.locator("#figures meter").evaluate("node => node.value") == 0.9
    labels = "node => node.plot.series.map(each => each.label)"
    assert tab.locator("#figures .plot").nth(1).evaluate(labels) == ["two", "one"]


SEEDS = results(
    *(
        run(place, status, best, **{"optimizer.lr": lr, "model": "mlp", "seed": seed})
        for place, (status, best, lr, seed) in enumerate(
            [
                ("completed", 0.8, 0.001, 1),
                ("completed", 0.9, 0.001, 2),
                ("completed", 0.95, 0.1, 1),
                ("pruned", 0.2, 0.1, 2),
                ("failed", None, 0.1, 3),
            ]
        )
    ),
    keys=("optimizer.lr", "model", "seed"),
)


def test_make_plots_returns_curves_and_one_plot_per_key() -> None:
    plots = make_plots(SEEDS)
    assert list(plots) == ["curves.png", "by_optimizer.lr.png", "by_model.png", "by_seed.png"]


def test_make_plots_key_with_slash_has_safe_file_name() -> None:
    lines = run(0, "completed", 0.9, **{"+a/b c": 1}), run(1, "completed", 0.8, **{"+a/b c": 2})
    assert list(make_plots(results(*lines, keys=("+a/b c",)))) == ["curves.png", "by_+a_b_c.png"]


@pytest.mark.parametrize("table", [pd.DataFrame(), SWEEP.table.iloc[1:2]])
def test_make_plots_without_values_returns_nothing(table: pd.DataFrame) -> None:
    assert make_plots(Results("nothing", table, ["model"], [ACCURACY], {})) == {}


def test_plot_curves_has_line_per_run() -> None:
    axes = make_plots(SWEEP)["curves.png"].axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [
        [0.45, 0.9], [0.49, 0.98], [0.35, 0.7],
    ]  # fmt: skip
    assert [line.get_linewidth() for line in axes.lines] == [1.0, 2.5, 1.0]
    legend = axes.get_legend()
    assert legend is not None
    assert legend.get_texts()[1].get_text() == "job=2, optimizer.lr=0.1, model=cnn (best)"


def test_plot_curves_many_runs_has_no_legend() -> None:
    many = [run(job, "completed", 0.5, model="mlp") for job in range(13)]
    assert make_plots(results(*many, keys=("model",)))["curves.png"].axes[0].get_legend() is None


def test_plot_by_key_means_are_of_completed_runs() -> None:
    axes = make_plots(SEEDS)["by_optimizer.lr.png"].axes[0]
    completed, others, means, *_ = [line.get_xydata().tolist() for line in axes.lines]
    assert axes.get_xscale() == "log"
    assert completed == [[0.001, 0.8], [0.001, 0.9], [0.1, 0.95]]
    assert others == [[0.1, 0.2]]
    assert means == [[0.001, pytest.approx(0.85)], [0.1, 0.95]]
    (bars,) = axes.containers[0].lines[2]
    low, high = bars.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(0.1 / math.sqrt(2))


def test_plot_by_key_categories_have_ticks_and_seeds_no_means() -> None:
    by_model = make_plots(SWEEP)["by_model.png"].axes[0]
    assert [label.get_text() for label in by_model.get_xticklabels()] == ["mlp", "cnn"]
    assert by_model.lines[0].get_xydata().tolist() == [[0, 0.9], [1, 0.98]]
    assert len(make_plots(SEEDS)["by_seed.png"].axes[0].containers) == 0


@pytest.mark.filterwarnings("error")
def test_make_plots_missing_values_draws_without_warnings() -> None:
    lines = run(0, "running", 0.9, clip=None, model=True), run(1, "failed", None, clip=1, model=1)
    for figure in make_plots(results(*lines, keys=("clip", "model"))).values():
        figure.draw_without_rendering()
    figure = make_plots(results(lines[0], keys=("clip",)))["by_clip.png"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["null"]


@pytest.mark.filterwarnings("error")
def test_make_plots_no_curves_and_no_completed_run_draws() -> None:
    line = run(0, "running", 0.9, model="mlp", seed=1)
    without = Results("a sweep", pd.DataFrame([line]), ["model", "seed"], [ACCURACY], {})
    for figure in make_plots(without).values():
        figure.draw_without_rendering()


def test_make_plots_dollars_in_value_are_not_math() -> None:
    line = run(0, "completed", 0.9, **{"data.root": r"$\oops{$" + 100 * "long"})
    for figure in make_plots(results(line, keys=("data.root",))).values():
        figure.draw_without_rendering()
    (tick,) = figure.axes[0].get_xticklabels()
    assert tick.get_text() == r"\$\oops{\$" + 12 * "long" + "lon…"


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2, 3], "linear"),
        ([0.001, 0.1], "log"),
        ([0.001, 0.099], "linear"),
        ([0, 1, 1000], "linear"),
        (["a", "b"], "category"),
        ([True, False], "category"),
        ([1, "a"], "category"),
        ([None, 1, 5], "category"),
        ([None, *range(20)], "linear"),
        ([math.nan, math.nan], "category"),
    ],
)
def test_axis_scale_depends_on_values(values: list[object], kind: str) -> None:
    assert axis_scale(values) == kind
