"""Run benchmarks, each in a process of its own, and collect their tables.

    python -m benchmarks                    # all of them; hours on a small machine
    python -m benchmarks peers startup --quick
    python -m benchmarks --list
    python -m benchmarks --update docs/benchmarks.md

The folder `--out` gets a Markdown and a CSV file for each table, and `benchmarks.md` with all of
them. A benchmark that fails does not stop the others, and makes the exit code 1; one that cannot
run on this machine is skipped with its reason. `--update` runs nothing: it replaces the tables of
a page, each between `<!-- table NAME -->` and `<!-- end of table -->`, by those in the folder.

A benchmark is a module in this folder with a function `main`. Its constant `QUICK`, if it has one,
has the options for a run that only shows that it works.
"""

from __future__ import annotations

import argparse
import ast
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.tables import SKIPPED

FOLDER = Path(__file__).parent
PAGE = "benchmarks.md"
TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


@dataclass(frozen=True)
class Benchmark:
    """A module with a function `main`.

    Attributes:
        summary: First line of its docstring.
        quick: Options for a short run.
    """

    name: str
    summary: str
    quick: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How a benchmark ended.

    Attributes:
        reason: Last line of its error output, unless it completed.
        tables: Its tables, as Markdown.
    """

    name: str
    status: Literal["completed", "skipped", "failed"]
    reason: str
    tables: Sequence[str]


def main(arguments: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """Run the benchmarks of a folder; return the exit code."""
    benchmarks = find_benchmarks(folder)
    options = parse_options(arguments, [*benchmarks])
    if options.list:
        print("\n".join(f"{each.name}: {each.summary}" for each in benchmarks.values()))
        return 0
    if options.update:
        print(f"{options.update}: replaced {', '.join(update_page(options.update, options.out))}")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for name in options.names or benchmarks:
        outcomes.append(run(benchmarks[name], folder, options.out, options.quick))
        write_page(outcomes, options.out)
    for outcome in outcomes:
        print(
            f"{outcome.status}: {outcome.name}" + (f" ({outcome.reason})" if outcome.reason else "")
        )
    return int(any(outcome.status == "failed" for outcome in outcomes))


def parse_options(arguments: Sequence[str] | None, known: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that they work")
    parser.add_argument("--list", action="store_true", help="list the benchmarks and exit")
    parser.add_argument("--update", type=Path, metavar="PAGE", help="replace tables of a page")
    options = parser.parse_args(arguments)
    if unknown := sorted({*options.names} - {*known}):
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(known)}")
    return options


def find_benchmarks(folder: Path) -> dict[str, Benchmark]:
    """Return the modules with a function `main` by name, without importing them."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        functions = {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
        if "main" in functions and path.stem != "__main__":
            summary = (ast.get_docstring(module) or "").partition("\n")[0]
            found[path.stem] = Benchmark(path.stem, summary, quick_options(module))
    return found


def quick_options(module: ast.Module) -> tuple[str, ...]:
    """Return the value of the constant `QUICK`; empty if the module has none."""
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "QUICK":
            return tuple(ast.literal_eval(node.value))
    return ()


def run(benchmark: Benchmark, folder: Path, out: Path, is_quick: bool) -> Outcome:
    """Run a benchmark and put its tables into `out`."""
    options = benchmark.quick if is_quick else ()
    command = ["-m", f"{folder.name}.{benchmark.name}", *options]
    print(f"== python {' '.join(command)}", flush=True)
    load, start = os.getloadavg()[0], time.perf_counter()
    with tempfile.TemporaryDirectory() as temp:
        code, last_line = run_process([*command, "--out", temp], folder.parent)
        seconds = time.perf_counter() - start
        loads = f"load {load:.1f} before and {os.getloadavg()[0]:.1f} after"
        origin = f"`python {' '.join(command)}`: {seconds:.0f} s on {machine()}; {loads}."
        tables = [collect(path, out, origin) for path in sorted(Path(temp).glob("*.md"))]
    if code == 0:
        return Outcome(benchmark.name, "completed", "", tables)
    return Outcome(benchmark.name, "skipped" if code == SKIPPED else "failed", last_line, tables)


def run_process(arguments: Sequence[str], cwd: Path) -> tuple[int, str]:
    """Run Python; return its exit code and the last line of its error output, which is shown."""
    last_line = ""
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, cwd=cwd, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            last_line = line.strip() or last_line
    return process.returncode, last_line


def collect(path: Path, out: Path, origin: str) -> str:
    """Copy a table and its CSV file to `out`; return its Markdown, which says where it is from."""
    table = f"{path.read_text(encoding='utf-8')}\n{origin}\n"
    (out / path.name).write_text(table, encoding="utf-8")
    csv = path.with_suffix(".csv")
    (out / csv.name).write_bytes(csv.read_bytes())
    return table


def machine() -> str:
    """Describe this machine and the versions that matter."""
    import torch

    parts = [f"{os.cpu_count()} cores of {processor()}"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return ", ".join([*parts, platform.system(), versions, time.strftime("%Y-%m-%d")])


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def write_page(outcomes: Sequence[Outcome], out: Path) -> None:
    """Write all tables of this call to one page."""
    parts = ["# Benchmarks\n"]
    for outcome in outcomes:
        if outcome.status != "completed":
            parts.append(f"`{outcome.name}` {outcome.status}: {outcome.reason}\n")
        parts += outcome.tables
    (out / PAGE).write_text("\n".join(parts), encoding="utf-8")


def update_page(page: Path, out: Path) -> list[str]:
    """Replace the tables of a page by those in a folder; return their names."""
    names = []

    def replace(match: re.Match[str]) -> str:
        path = out / f"{match[2]}.md"
        if not path.exists():
            return match[0]
        names.append(match[2])
        without_heading = path.read_text(encoding="utf-8").partition("\n\n")[2]
        return f"{match[1]}{without_heading}{match[3]}"

    page.write_text(TABLE.sub(replace, page.read_text(encoding="utf-8")), encoding="utf-8")
    return names


if __name__ == "__main__":
    sys.exit(main())
