"""The demo's table in a terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

WIDTH = 124  # where the output is no terminal

# What the columns mean; the HTML report prints the same words.
LEGEND = (
    "Density: attended share of the visible (query, key) pairs. Mass recall: share of the dense attention "
    "mass that the attended keys hold, exp(lse - dense lse), over all queries, heads and layers; 'worst 1 %' "
    "is the value that 99 % of the queries exceed. Output error: |out - dense out| / |dense out| of the "
    "attention layers, given the same input; it can be large where recall is high, since sink tokens hold "
    "mass but little content. Perplexity: of the whole model with the method in every layer. "
    "Time: a layer's attention, finding the pattern included, against torch's scaled_dot_product_attention; "
    "medians over the layers, run in turn in one process."
)


def headline(report: dict[str, Any]) -> str:
    """One sentence that says what ran."""
    engine = report["provenance"]["engine"]
    if "model" not in report:
        return f"Structured queries and keys, engine {engine}"
    return f"{report['model']} reading {report['tokens']} tokens ({report['text']}), engine {engine}"


def cells(row: dict[str, Any], dense: dict[str, Any] | None) -> list[str]:
    """The text of a row, in the order of `HEADINGS`."""
    perplexity = "-"
    if row["perplexity"] is not None and dense is not None:
        change = round(row["perplexity"] / dense["perplexity"] - 1, 3) + 0.0  # + 0.0: no "-0.0%"
        perplexity = f"{row['perplexity']:.2f} {change:+.1%}"
    return [
        row["label"],
        f"{row['density']:.1%}",
        f"{row['recall_mean']:.2%}",
        f"{row['recall_worst']:.1%}",
        f"{row['output_error']:.1%}",
        perplexity,
        f"{row['select_ms']:.1f}",
        f"{row['attend_ms']:.1f}",
        f"{row['sdpa_ms']:.1f}",
        f"{row['time_ratio']:.2f}x",
    ]


HEADINGS = (
    "Method", "Density", "Mass recall", "worst 1 %", "Output error", "Perplexity", "Select, ms", "Attend, ms",
    "torch SDPA, ms", "Time / SDPA",
)  # fmt: skip


def dense_cells(dense: dict[str, Any]) -> list[list[str]]:
    """Two rows: torch's dense attention and our own full layout."""
    sdpa, full = dense["sdpa_ms"], dense["full_ms"]
    exact = ["100.0%", "100.00%", "100.0%", "0.0%", f"{dense['perplexity']:.2f}"]
    return [
        ["dense, torch SDPA", *exact, "-", f"{sdpa:.1f}", f"{sdpa:.1f}", "1.00x"],
        ["dense, full layout", *exact, "-", f"{full:.1f}", f"{sdpa:.1f}", f"{full / sdpa:.2f}x"],
    ]


def sections(report: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The rows of each input: (its description, rows), the language model first."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in report["methods"]:
        grouped.setdefault(row["input"], []).append(row)
    return list(grouped.items())


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=WIDTH, file=console.file)
    dense = report.get("dense")
    table = Table(
        title=headline(report), title_justify="left", title_style="bold", pad_edge=False, box=SIMPLE_HEAD
    )
    for number, name in enumerate(HEADINGS):
        table.add_column(
            name, justify="left" if number == 0 else "right", no_wrap=name in ("Method", "Perplexity")
        )
    for line in dense_cells(dense) if dense else []:
        table.add_row(*line, style="dim")
    for description, rows in sections(report):
        if rows[0]["perplexity"] is None:
            table.add_section()
            table.add_row(f"- {description}", style="dim")
        for row in rows:
            table.add_row(*cells(row, dense))
    console.print(table)
    console.print(LEGEND, style="dim", highlight=False)
    console.print("\nWhich method fits which model", style="bold")
    for row in report["methods"]:
        console.print(f"[bold]{row['label']}[/bold]: {row['fits']} [dim]{row['note']}[/dim]", highlight=False)
    machine = report["provenance"]
    console.print(
        f"\n{machine['machine']}, {machine['threads']} threads, {machine['dtype']}, {machine['date']}; "
        f"{report['seconds']:.0f} s in all",
        style="dim", highlight=False,
    )  # fmt: skip
