"""`sparse-attn frontier`: sweep every method on a model and a text; rows, a table, a picture and a page."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from sparse_attn.demo.model import MissingAssetError
from sparse_attn.recipe_files import write_whole
from sparse_attn.search.candidates import Shape
from sparse_attn.search.commands import _Bar, load_language_model, read_calibration_text, text_samples
from sparse_attn.search.frontier import ORACLE, WINDOW, default_points, sweep
from sparse_attn.search.models import LanguageModel
from sparse_attn.search.report import COLOURS

COLUMNS = ("point", "density", "perplexity", "recall", "worst 1 %", "select ms", "attend ms")


def frontier_command(
    model: Annotated[str, typer.Argument(help="A transformers model directory, or 'demo' (SmolLM2-135M).")],
    text: Annotated[Path | None, typer.Option(help="A text file; default: the demo's text.")] = None,
    out: Annotated[
        Path, typer.Option(help="Rows, one a line; .md, .png and .html are written beside it.")
    ] = Path("frontier.jsonl"),
    tokens: Annotated[int, typer.Option(help="Tokens of a sample.")] = 4096,
    samples: Annotated[int, typer.Option(help="Samples, from even distances in the text.")] = 1,
    methods: Annotated[
        str | None,
        typer.Option(help="Comma-separated: window, oracle and names of methods; default: all that fit."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: a GPU where there is one.")
    ] = None,
    png: Annotated[bool, typer.Option(help="Draw the curves (needs matplotlib).")] = True,
) -> None:
    """Density against perplexity and mass recall, for every method and each setting of its knob.

    A sweep that was interrupted goes on where it stopped: the same call measures only what is missing.
    """
    messages = Console(stderr=True)
    try:
        if tokens < 2 or samples < 1:
            raise ValueError("frontier: --tokens must be at least 2, --samples at least 1.")
        names = None if methods is None else [x.strip() for x in methods.split(",") if x.strip()]
        loaded = load_language_model(model, tokens, device)
        ids = text_samples(loaded, read_calibration_text(text), tokens, samples).to(loaded.model.device)
        language = LanguageModel(loaded.model, ids)
        f = language.fingerprint
        points = default_points(Shape(tokens, f.num_heads, f.num_kv_heads, f.head_dim), names)
        about = {
            "model": loaded.name, "text": language.calibration_hash[:16], "tokens": tokens,
            "samples": samples,
            "device": str(ids.device.type), "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(), "torch": torch.__version__,
        }  # fmt: skip
        with _Bar(messages) as bar:
            rows = sweep(language, points, out, about, bar)
        write_whole(out.with_suffix(".md"), table(rows).encode())
        picture = out.with_suffix(".png") if png else None
        if picture is not None:
            draw(rows, picture)
        write_whole(out.with_suffix(".html"), page(rows, picture).encode())
    except (MissingAssetError, ValueError, NotImplementedError) as error:
        messages.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        messages.print(f"interrupted; {out} holds what was measured, the same call goes on.")
        raise typer.Exit(130) from None
    console = Console()
    console.print(table(rows), markup=False, highlight=False, soft_wrap=True)
    console.print(f"{out}, .md, .html" + (", .png" if png else ""), highlight=False)


# -- tables ---------------------------------------------------------------------------------------------


def cells(row: dict[str, Any]) -> list[str]:
    """A row under `COLUMNS`."""
    select = "-" if row["select_ms"] is None else f"{row['select_ms']:.0f}"
    attend = f"{row['attend_ms']:.0f}"
    return [
        row["label"], f"{row['density']:.3f}", f"{row['rise_percent']:+.2f} %", f"{row['recall']:.4f}",
        f"{row['recall_worst']:.3f}", select, attend,
    ]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def provenance(rows: list[dict[str, Any]]) -> str:
    r = rows[0]
    return (
        f"{r['model']}, {r['samples']} sample(s) of {r['tokens']} tokens (hash {r['text']}), {r['dtype']}, "
        f"dense perplexity {r['perplexity']:.4f}; {r['device']}, {r['threads']} thread(s), "
        f"torch {r['torch']}."
    )


# -- pictures -------------------------------------------------------------------------------------------


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Density against perplexity, against the worst 1 % of recall, and time against perplexity.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError(
            "frontier: the picture needs matplotlib: pip install matplotlib, or pass --no-png"
        ) from None
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 6.4), layout="constrained")
    for family, points, style in _curves(rows):
        density = [p["density"] for p in points]
        rise = [max(p["rise_percent"], FLOOR) for p in points]
        axes[0].plot(density, rise, **style, label=family)
        axes[1].plot(density, [p["recall_worst"] for p in points], **style)
        if family != ORACLE:
            by_time = sorted(points, key=_time)
            axes[2].plot(
                [_time(p) for p in by_time], [max(p["rise_percent"], FLOOR) for p in by_time], **style
            )
    widest = max((p["density"] for p in rows[1:]), default=1.0)
    axes[0].set(xlabel="attended density of causal", ylabel="perplexity rise, %", yscale="log")
    axes[0].set_title("density against perplexity")
    axes[1].set(xlabel="attended density of causal", ylabel="mass recall", ylim=(0, 1))
    axes[1].set_title("density against the worst 1 % of rows (mean of heads)")
    axes[2].set(xlabel="selection + attention, ms a pass", ylabel="perplexity rise, %", yscale="log")
    axes[2].set_title("measured time against perplexity")
    axes[2].axvline(_time(rows[0]), color="grey", lw=1)
    axes[2].annotate("dense ", (_time(rows[0]), FLOOR), color="grey", fontsize="small", ha="right")
    axes[2].set_xlim(0, 1.5 * _time(rows[0]))  # what is slower than that has no use
    for axis in axes:
        axis.grid(alpha=0.25)
    for axis in axes[:2]:
        axis.set_xlim(0, min(widest * 1.05, 1.0))
    for axis in (axes[0], axes[2]):
        axis.set_ylim(bottom=FLOOR * 0.9)
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axis.axhline(2, color="grey", lw=0.8, ls=":")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


FLOOR = 0.1  # percent: smaller rises, and falls, are drawn here


def _time(row: dict[str, Any]) -> float:
    return (row["select_ms"] or 0.0) + row["attend_ms"]


def _curves(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """(family, its points by density, how to draw it), dense left out."""
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows[1:]:
        families.setdefault(row["family"], []).append(row)
    colours = iter(COLOURS * (len(families) // len(COLOURS) + 1))
    fixed = {ORACLE: {"color": "black", "ls": "--"}, WINDOW: {"color": "#7a8594", "ls": "--"}}
    markers = iter("osD^vPX*<>ph" * (len(families) // 12 + 1))
    return [
        (
            family,
            sorted(points, key=lambda p: p["density"]),
            {"marker": next(markers), "ms": 5, "lw": 1.5} | (fixed.get(family) or {"color": next(colours)}),
        )
        for family, points in families.items()
    ]


def page(rows: list[dict[str, Any]], picture: Path | None) -> str:
    """One HTML file that refers to nothing outside itself."""
    css = Path(__file__).with_name("report_page.css").read_text(encoding="utf-8")
    image = ""
    if picture is not None:
        data = base64.b64encode(picture.read_bytes()).decode()
        image = (
            f'<section class="scroll"><img alt="the curves" style="width:100%;min-width:720px" '
            f'src="data:image/png;base64,{data}"></section>'
        )
    head = "".join(f'<th style="text-align:left;padding:2px 14px 2px 0">{escape(x)}</th>' for x in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f'<td style="padding:2px 14px 2px 0">{escape(x)}</td>' for x in cells(row)) + "</tr>"
        for row in rows
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>sparse_attn frontier</title><style>{css}</style></head>\n<body><main>\n"
        f"<h1>Quality frontier of {escape(rows[0]['model'])}</h1>"
        f'<p class="soft">{escape(provenance(rows))}</p>'
        f'{image}<section class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</section></main></body></html>\n"
    )
