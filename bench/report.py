"""Tables and a picture from rows: of the run just made, or of a JSONL file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_attn.bench.cases import Bar

Row = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """A bar beside what was measured; `measured` is None where there is no such row."""

    bar: Bar
    measured: float | None
    engine: str = ""
    absent: tuple[str, ...] = ()

    @property
    def met(self) -> bool:
        return self.measured is not None and not self.absent and self.bar.met(self.measured)

    @property
    def word(self) -> str:
        if self.measured is None:
            return "not measured"
        word = "met" if self.bar.met(self.measured) else "SHORT"
        return f"{word}, without {', '.join(self.absent)}" if self.absent else word


def judge(bars: list[Bar], rows: list[Row]) -> list[Verdict]:
    """Each bar with the value of its row (of ours; of one case and step the latest)."""
    return [_verdict(bar, rows) for bar in bars]


def _verdict(bar: Bar, rows: list[Row]) -> Verdict:
    for row in reversed(rows):
        same = row["case"] == bar.case and row["step"] == bar.step
        if same and row["provider"].startswith("ours"):
            absent = row.get("rivals", {}).get("absent", ()) if bar.metric == "speed_vs_rivals" else ()
            engine = row["provider"].removeprefix("ours-")
            return Verdict(bar, lookup(row, bar.metric), engine, tuple(absent))
    return Verdict(bar, None)


def lookup(row: Row, path: str) -> float | None:
    """The number at a dotted path, or None."""
    value: Any = row
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return None if value is None else float(value)


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


# -- tables ---------------------------------------------------------------------------------------


def print_table(title: str, header: list[str], cells: list[list[str]]) -> None:
    """With rich where it is installed, else in plain text."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        _print_plain(title, header, cells)
        return
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < 3 else "right", overflow="fold")
    for line in cells:
        table.add_row(*line)
    console = Console()
    if not console.is_terminal:  # a log: do not fold the table to 80 columns
        console = Console(width=200)
    console.print(table)


def _print_plain(title: str, header: list[str], cells: list[list[str]]) -> None:
    widths = [max(len(x) for x in column) for column in zip(header, *cells, strict=True)]
    print(f"\n{title}")
    for line in [header, ["-" * w for w in widths], *cells]:
        print("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip())


def print_rows(rows: list[Row]) -> None:
    """Times of every case and provider."""
    timed = [row for row in rows if "ms" in row]
    names = "case provider step ms p10 p90 host_us density TFLOPS eff. recall p1 error"
    header = [*names.split(), "speed against"]
    cells = [
        [
            row["case"], row["provider"], row["step"],
            f"{row['ms']['median']:.3f}", f"{row['ms']['p10']:.3f}", f"{row['ms']['p90']:.3f}",
            _number(row, "host_us", 0), f"{row['density']:.4f}",
            *(_number(row, *item) for item in (
                ("tflops", 2), ("sparse_efficiency", 3), ("mass_recall.mean", 4), ("mass_recall.p1", 4),
                ("output_error", 4),
            )),
            ", ".join(f"{name} {gain:.2f}x" for name, gain in row.get("speed_vs", {}).items()),
        ]
        for row in timed
    ]  # fmt: skip
    if cells:
        print_table("times", header, cells)
    memory = [row for row in rows if row["step"] == "memory"]
    if memory:
        print_memory(memory)


def print_memory(rows: list[Row]) -> None:
    header = [
        "method",
        "length",
        "heads",
        "density",
        "layout MiB",
        "selection MiB",
        "attention MiB",
        "largest / S^2",
    ]
    cells = [
        [
            row["case"], str(row["length"]), str(row["heads"]), f"{row['density']:.4f}",
            *(f"{row[name] / 2**20:.1f}" for name in (
                "layout_bytes", "selection_extra_bytes", "attention_extra_bytes",
            )),
            f"{row['largest_over_square']:.4f}",
        ]
        for row in rows
    ]  # fmt: skip
    print_table(
        "memory, above the inputs (selection: and the layout; attention: and the output)", header, cells
    )


def _number(row: Row, path: str, digits: int) -> str:
    value = lookup(row, path)
    return "" if value is None else f"{value:.{digits}f}"


def print_absent(absent: dict[str, str]) -> None:
    """What was left out, one line a reason."""
    by_reason: dict[str, list[str]] = {}
    for what, why in absent.items():
        by_reason.setdefault(why, []).append(what)
    cells = [
        [what[0] + (f" and {len(what) - 1} more" if len(what) > 1 else ""), why]
        for why, what in by_reason.items()
    ]
    if cells:
        print_table("left out", ["what", "why"], cells)


def print_verdicts(verdicts: list[Verdict]) -> None:
    """The table bar / measured / met."""
    cells = [
        [
            v.bar.name, v.bar.how, v.engine, v.bar.limit,
            "-" if v.measured is None else f"{v.measured:.4g}", v.word,
        ]
        for v in verdicts
    ]  # fmt: skip
    print_table("bars", ["bar", "computed as", "engine", "limit", "measured", "verdict"], cells)


# -- picture --------------------------------------------------------------------------------------


def plot(rows: list[Row], path: Path) -> None:
    """Time against density of ours, with the ideal line best dense time x density.

    Raises:
        ValueError: matplotlib is not installed, or no row has a sparse efficiency.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("bench: --plot needs matplotlib; pip install matplotlib.") from error
    points = [row for row in rows if "sparse_efficiency" in row and row["step"] == "fwd"]
    if not points:
        raise ValueError("bench: --plot found no row with a sparse efficiency.")
    figure = Figure(figsize=(7, 5))
    axes = figure.add_subplot()
    for provider in sorted({row["provider"] for row in points}):
        mine = [row for row in points if row["provider"] == provider]
        x, y = [row["density"] for row in mine], [row["sparse_efficiency"] for row in mine]
        axes.scatter(x, y, label=provider)
    axes.axhline(1.0, color="grey", linewidth=1, label="ideal: dense time x density")
    axes.set(xlabel="density", ylabel="sparse efficiency", xscale="log", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
