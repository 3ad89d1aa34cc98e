"""`sparse-attn bench`, and the same as a plain script: `python bench/run.py --suite cpu`.

The suites time this package beside its peers and print every bar of `suites.py` with what was measured.
The exit status is 0 when all bars are met, 1 when one falls short or an answer is wrong, 2 when
the suite cannot run here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__" and sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # as a script: modules of this folder are imported through the package only

import torch

from sparse_attn.bench.cases import Bar, Case
from sparse_attn.bench.report import (
    Row,
    judge,
    plot,
    print_absent,
    print_rows,
    print_verdicts,
    read_rows,
)
from sparse_attn.bench.runner import Options, Outcome, run_cases
from sparse_attn.bench.suites import BARS, CASES, method_cases
from sparse_attn.version import __version__

with contextlib.suppress(ImportError):  # the script needs none
    import typer

SUITES = ("smoke", "cpu", "triton", "hopper", "methods", "memory")
PEER_PACKAGES = (
    "flash-attn", "flash-attn-4", "tokenspeed-fa3", "nvidia-cudnn-frontend", "nvidia-cutlass-dsl",
    "quack-kernels",
)  # fmt: skip


class CannotRun(RuntimeError):
    """The suite does not fit this machine; the text says what it needs."""


def stamp() -> dict[str, Any]:
    """Where and with what a row was measured."""
    on_gpu = torch.cuda.is_available()
    ask_driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    commit = os.environ.get("SPARSE_ATTN_BENCH_COMMIT")  # of a copy of the tree without its history
    if commit:
        source: dict[str, Any] = {"commit": commit}
    else:
        changed = _command("git", "status", "--porcelain", "--untracked-files=no").splitlines()
        source = {"commit": _command("git", "rev-parse", "--short=12", "HEAD"), "changed_files": len(changed)}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **source,
        "card": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "driver": _command(*ask_driver) if on_gpu else "",
        "threads": torch.get_num_threads(),
        "versions": {
            "sparse_attn": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda or "",
            "triton": _version("triton"),
            **{name: version for name in PEER_PACKAGES if (version := _version(name))},
        },
    }


def cpu_name() -> str:
    """The processor's model name, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _command(*words: str) -> str:
    try:
        where = Path(__file__).resolve().parent
        done = subprocess.run(words, cwd=where, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def run_suite(
    suite: str,
    *,
    out: str | None = None,
    engine: str | None = None,
    device: str | None = None,
    length: int | None = None,
    heads: int | None = None,
    budget_s: float | None = None,
    picture: str | None = None,
    only: str | None = None,
) -> int:
    """Run one suite, print its tables, write its rows.

    Args:
        suite: one of `SUITES`.
        out: folder for SUITE-DEVICE.jsonl, or a file name ending in .jsonl; None writes nothing.
        engine: time this engine of ours; default: the first that can run each case.
        device: "cpu" or "cuda"; default: cuda where there is one (cpu for the suite cpu).
        length, heads: size of the suites methods and memory.
        budget_s: cases that would start later than this are left out; default for triton: 240.
        only: comma-separated prefixes of case names; the other cases and their bars are left out, and rows
            are added to the file instead of replacing it.
        picture: write a plot of sparse efficiency against density to this file.

    Returns:
        The exit status.
    """
    if suite not in SUITES:
        raise ValueError(f"bench: no suite {suite!r}; choose one of {', '.join(SUITES)}.")
    device = device or ("cuda" if torch.cuda.is_available() and suite != "cpu" else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise CannotRun("torch sees no CUDA device.")
    if suite in ("triton", "hopper") and device != "cuda":
        raise CannotRun(f"the suite {suite} needs a CUDA device; on this machine run the suite cpu.")
    if suite == "memory" and only is not None:
        raise ValueError("bench: the suite memory takes no --only; it is one table.")
    budget_s = 240.0 if budget_s is None and suite == "triton" else budget_s
    path, where, start = _path(out, suite, device, fresh=only is None), stamp(), time.perf_counter()

    def keep(rows: list[Row]) -> None:
        for row in rows:
            row |= {"suite": suite, **where}
        if path is not None:
            with path.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    reference = suite in ("smoke", "methods", "memory")
    options = Options(device, engine, reference, budget_s, _log, keep)
    outcome, bars = _run(suite, options, length, heads, only)
    print_rows(outcome.rows)
    print_absent(outcome.absent)
    verdicts = judge(bars, outcome.rows)
    if verdicts:
        print_verdicts(verdicts)
    for text in outcome.red:
        print(f"WRONG RESULT, not reported: {text}")
    if picture is not None:
        plot(outcome.rows, Path(picture))
    _log(f"suite {suite} on {where['card']}: {time.perf_counter() - start:.0f} s")
    if path is not None:
        _log(f"rows in {path}")
    return 1 if outcome.red or not outcome.rows or not all(v.met for v in verdicts) else 0


def _run(
    suite: str, options: Options, length: int | None, heads: int | None, only: str | None
) -> tuple[Outcome, list[Bar]]:
    on_gpu = options.device == "cuda"
    if suite == "memory":
        from sparse_attn.bench.memory import FULL_HEADS, FULL_LENGTH, memory_bars, run_memory

        length = length or (FULL_LENGTH if on_gpu else 8192)
        heads = heads or (FULL_HEADS if on_gpu else 4)
        return run_memory(options, length=length, heads=heads), memory_bars(length, heads)
    if suite == "methods":
        cases = method_cases(length or (32768 if on_gpu else 4096), heads or (16 if on_gpu else 4), on_gpu)
    else:
        cases = CASES[suite]
    bars = BARS[suite]
    if only is not None:
        cases = chosen(cases, only)
        names = {case.name for case in cases}
        bars = [bar for bar in bars if bar.case in names]
    return run_cases(cases, options), bars


def chosen(cases: list[Case], only: str) -> list[Case]:
    """The cases whose name starts with one of the comma-separated words.

    Raises:
        ValueError: a word fits none.
    """
    words = [word.strip() for word in only.split(",") if word.strip()]
    idle = [word for word in words if not any(case.name.startswith(word) for case in cases)]
    if idle or not words:
        names = ", ".join(case.name for case in cases)
        raise ValueError(f"bench: no case starts with {', '.join(idle) or repr(only)}; there are {names}.")
    return [case for case in cases if case.name.startswith(tuple(words))]


def _path(out: str | None, suite: str, device: str, *, fresh: bool) -> Path | None:
    if out is None:
        return None
    path = Path(out)
    if path.suffix != ".jsonl":
        path = path / f"{suite}-{device}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    if fresh:
        path.unlink(missing_ok=True)
    return path


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _finish(suite: str, **options: Any) -> int:
    try:
        return run_suite(suite, **options)
    except (CannotRun, ValueError) as error:
        _log(f"bench: {error}")
        return 2


def bench_command(
    suite: Annotated[str, typer.Option(help=f"One of {', '.join(SUITES)}.")] = "smoke",
    out: Annotated[str | None, typer.Option(help="Folder or .jsonl file for the rows.")] = None,
    engine: Annotated[str | None, typer.Option(help="Time this engine of ours.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens (suites methods and memory).")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads (suites methods and memory).")] = None,
    budget_s: Annotated[float | None, typer.Option(help="Start no case later than this.")] = None,
    picture: Annotated[str | None, typer.Option("--plot", help="Write a plot to this file.")] = None,
    only: Annotated[str | None, typer.Option(help="Prefixes of case names, comma-separated.")] = None,
    show: Annotated[str | None, typer.Option(help="Print the tables of this .jsonl file instead.")] = None,
    cost_table: Annotated[
        Path | None,
        typer.Option(help="Measure what `sparse-attn search` predicts times with, into this file."),
    ] = None,
) -> None:
    """Time sparse attention beside its peers and say which bars are met."""
    if cost_table is not None:
        from sparse_attn.search.cost_measure import measure_table

        on = device or ("cuda" if torch.cuda.is_available() else "cpu")
        cost_table.write_text(measure_table(device=on, length=length, advance=_log).to_json())
        return
    options = {"out": out, "engine": engine, "device": device, "length": length, "heads": heads, "only": only}
    status = show_file(show) if show else _finish(suite, **options, budget_s=budget_s, picture=picture)
    sys.exit(status)


def show_file(name: str) -> int:
    """Print the tables of a suite's JSONL file and its bars; returns 1 if one is not met."""
    rows = read_rows(Path(name))
    print_rows(rows)
    status = 0
    for suite in sorted({row["suite"] for row in rows}):
        mine = [row for row in rows if row["suite"] == suite]
        bars = BARS.get(suite, [])
        if suite == "memory":
            from sparse_attn.bench.memory import memory_bars

            bars = memory_bars(max(row["length"] for row in mine), max(row["heads"] for row in mine))
        verdicts = judge(bars, mine)
        if verdicts:
            print_verdicts(verdicts)
        status |= not all(v.met for v in verdicts)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=bench_command.__doc__)
    parser.add_argument("--suite", choices=SUITES, default="smoke")
    parser.add_argument("--out", help="folder or .jsonl file for the rows")
    parser.add_argument("--engine", help="time this engine of ours")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--length", type=int, help="tokens (suites methods and memory)")
    parser.add_argument("--heads", type=int, help="query heads (suites methods and memory)")
    parser.add_argument("--budget-s", type=float, help="start no case later than this")
    parser.add_argument("--plot", dest="picture", help="write a plot to this file")
    parser.add_argument("--only", help="prefixes of case names, comma-separated")
    parser.add_argument("--show", help="print the tables of this .jsonl file instead")
    options = vars(parser.parse_args())
    show = options.pop("show")
    return show_file(show) if show else _finish(options.pop("suite"), **options)


if __name__ == "__main__":
    sys.exit(main())
