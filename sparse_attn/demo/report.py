"""demo.html: one file that holds everything it shows."""

from __future__ import annotations

from html import escape
from typing import Any

from sparse_attn.demo.heads import Picture
from sparse_attn.demo.image import attention_png, pattern_png
from sparse_attn.demo.table import HEADINGS, LEGEND, cells, dense_cells, headline, sections
from sparse_attn.search.report import COLOURS, DENSE_COLOUR

_STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #dde2e8; --tint: #d6e4f4; --deep: #08306b; --red: #c81e14; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 6px; }
h2 { font-size: 1.2rem; margin: 36px 0 8px; }
h3 { font-size: 1rem; margin: 0; }
p { margin: 6px 0 12px; max-width: 78ch; }
.soft { color: var(--soft); font-size: .9rem; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 16px; }
.scroll { overflow-x: auto; padding: 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; font-size: .82rem; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td:first-child { font-weight: 600; }
tr:last-child td { border-bottom: 0; }
tr.part td { background: #f6f7f9; color: var(--soft); font-size: .85rem; font-weight: 400; }
tr.dense td { color: var(--soft); font-weight: 400; }
.bar { display: block; height: 4px; margin-top: 3px; background: var(--line); border-radius: 2px; }
.bar i { display: block; height: 4px; background: var(--deep); border-radius: 2px; }
.heads { display: grid; grid-template-columns: repeat(2, 1fr); gap: 18px; }
.head.wide { grid-column: 1 / -1; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(230px, 46%), 1fr)); gap: 14px; }
figure { margin: 10px 0 0; }
figure img { width: 100%; aspect-ratio: 1; image-rendering: pixelated; display: block; }
figure img { border: 1px solid var(--line); }
figcaption { font-size: .85rem; color: var(--soft); margin-top: 4px; line-height: 1.35; }
figcaption b { color: var(--ink); }
.fits { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 14px; }
.fits p { margin: 6px 0 0; font-size: .92rem; }
.key i { display: inline-block; width: 12px; height: 12px; margin: 0 4px 0 10px; vertical-align: -1px; }
.map { display: block; width: 100%; max-height: 340px; }
.key span { white-space: nowrap; }
code { font-size: .85em; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: 0; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 600px) {
  main { padding: 18px 12px 32px; }
  .head { grid-column: 1 / -1; }
  h1 { font-size: 1.35rem; }
  .card { padding: 12px; }
  .scroll { padding: 0; }
  th, td { padding: 8px; } .tiles { gap: 10px; }
}
"""


def render_html(report: dict[str, Any], pictures: list[Picture]) -> str:
    """The whole page; refers to nothing outside itself.

    Args:
        report: what demo.json holds.
        pictures: heads to draw, each with its patterns.
    """
    labels = {row["name"]: row["label"] for row in report["methods"]}
    parts = [
        f"<h1>Sparse attention beside dense</h1><p>{escape(headline(report))}.</p>",
        _table(report),
        f'<p class="soft">{escape(LEGEND)}</p>',
        _pictures(pictures, labels),
        _recipe(report["search"]) if "search" in report else "",
        _fits(report["methods"]),
        _provenance(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>sparse_attn demo</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(parts)}\n</main></body></html>\n"
    )


def _table(report: dict[str, Any]) -> str:
    dense = report.get("dense")
    lines = ["<tr>" + "".join(f"<th>{escape(name)}</th>" for name in HEADINGS) + "</tr>"]
    for line in dense_cells(dense) if dense else []:
        lines.append('<tr class="dense">' + "".join(f"<td>{escape(text)}</td>" for text in line) + "</tr>")
    for description, rows in sections(report):
        if rows[0]["perplexity"] is None:
            lines.append(f'<tr class="part"><td colspan="{len(HEADINGS)}">{escape(description)}</td></tr>')
        lines += [_row(row, dense) for row in rows]
    return f'<div class="card scroll"><table>{chr(10).join(lines)}</table></div>'


def _row(row: dict[str, Any], dense: dict[str, Any] | None) -> str:
    texts = [escape(text) for text in cells(row, dense)]
    bars = {"Density": row["density"], "Mass recall": row["recall_mean"], "Time / SDPA": row["time_ratio"]}
    for name, share in bars.items():
        texts[HEADINGS.index(name)] += _bar(share)
    return "<tr>" + "".join(f"<td>{text}</td>" for text in texts) + "</tr>"


def _bar(share: float) -> str:
    return f'<span class="bar"><i style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></i></span>'


def _pictures(pictures: list[Picture], labels: dict[str, str]) -> str:
    if not pictures:
        return ""
    key = (
        '<p class="soft key">Rows are queries, columns keys. First the true attention, darker where there '
        "is more (logarithmic scale). Beside it, what a method reads:"
        '<i style="background:#d6e4f4"></i>read<i style="background:#08306b"></i>attention mass that is read'
        '<i style="background:#c81e14"></i>attention mass that is missed.</p>'
    )
    heads = [_head(picture, labels) for picture in pictures]
    return f'<h2>What the methods read</h2>{key}<div class="heads">{chr(10).join(heads)}</div>'


def _head(picture: Picture, labels: dict[str, str]) -> str:
    figures = [_figure(attention_png(picture.truth, picture.visible), "true attention", "dense")]
    for name in picture.kept:
        source = pattern_png(picture.truth, picture.kept[name], picture.attended[name], picture.visible)
        numbers = f"density {picture.density[name]:.0%}, recall {picture.recall(name):.1%}"
        figures.append(_figure(source, labels[name], numbers))
    wide = " wide" if len(figures) > 2 else ""
    return (
        f'<div class="card head{wide}"><h3>{escape(picture.title)}</h3>'
        f'<div class="soft">{escape(picture.caption)}</div><div class="tiles">{"".join(figures)}</div></div>'
    )


def _figure(source: str, name: str, text: str) -> str:
    alt = escape(f"{name}: {text}")
    return (
        f'<figure><img src="{source}" alt="{alt}"><figcaption><b>{escape(name)}</b><br>{escape(text)}'
        "</figcaption></figure>"
    )


def _recipe(found: dict[str, Any]) -> str:
    """The pattern of every head, as the search chose it: layers across, heads down."""
    labels = [x["label"] for x in found["settings"]]
    others = iter(COLOURS)
    colours = [DENSE_COLOUR if label == "dense" else next(others, DENSE_COLOUR) for label in labels]
    cells = "".join(
        f'<rect x="{layer}.06" y="{head}.06" width=".88" height=".88" fill="{colours[n]}">'
        f"<title>layer {layer}, head {head}: {escape(labels[n])}</title></rect>"
        for layer, row in enumerate(found["grid"])
        for head, n in enumerate(row)
    )
    width, height = len(found["grid"]), max(len(row) for row in found["grid"])
    key = "".join(
        f'<span><i style="background:{colour}"></i>{escape(x["label"])} ({x["heads"]})</span> '
        for x, colour in zip(found["settings"], colours, strict=True)
    )
    return (
        '<h2>The recipe that the search found</h2><div class="card">'
        f'<p class="soft">{found["candidates"]} candidates were measured on every head, on {found["tokens"]} '
        "tokens that the table does not read. For each head the choice is the cheapest that keeps the "
        f"relative error of all (root mean square) within {found['budget']}: {found['error']:.3f}. It took "
        f"{found['seconds']:.0f} s. Layers across, heads down; <code>sparse-attn recipe show "
        f"{escape(found['recipe'])}</code> lists it.</p>"
        f'<svg class="map" viewBox="0 0 {width} {height}" role="img" aria-label="pattern of every head">'
        f'{cells}</svg><p class="soft key">{key}</p></div>'
    )


def _fits(rows: list[dict[str, Any]]) -> str:
    cards = [
        f'<div class="card"><h3>{escape(row["label"])}</h3><p>{escape(row["fits"])}</p>'
        f'<p class="soft">{escape(row["note"])}</p>'
        f'<p class="soft"><code>{escape(_options(row))}</code></p></div>'
        for row in rows
    ]
    return f'<h2>Which method fits which model</h2><div class="fits">{"".join(cards)}</div>'


def _options(row: dict[str, Any]) -> str:
    settings = ", ".join(f"{name}={value!r}" for name, value in row["options"].items())
    return f"{row['name']}: {settings}"


def _provenance(report: dict[str, Any]) -> str:
    facts = report["provenance"]
    lines = {
        "Date": facts["date"],
        "Machine": f"{facts['machine']}, {facts['threads']} threads, {facts['platform']}",
        "Engine": f"{facts['engine']}, {facts['dtype']}",
        "Versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "Took": f"{report['seconds']:.0f} s",
    }
    if "model" in report:
        lines["Model and text"] = f"{report['model']}; {report['text']}, {report['tokens']} tokens"
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in lines.items())
    return f'<h2>Where these numbers come from</h2><div class="card"><dl>{items}</dl></div>'
