"""The HTML of `sparse-attn report`; it refers to nothing outside itself."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_attn.search.maps import GRID

if TYPE_CHECKING:
    from sparse_attn.search.report import Head, Report


def page(report: Report) -> str:
    """The whole page."""
    model = report.recipe.model
    partial = " (partial)" if report.recipe.partial else ""
    parts = [
        f"<h1>Recipe for {escape(model.architecture)}{partial}</h1>",
        f'<p class="soft">{model.num_layers} layers of {model.num_heads} heads on {model.num_kv_heads} key '
        f"heads, head size {model.head_dim}.</p>",
        _cards(report),
        '<div class="two">',
        f"<section><h2>Pattern of each head</h2>{_maps(report)}{_legend(report)}</section>",
        _detail(report),
        "</div>",
        _curve(report.summary),
        _trials(report.summary),
        _provenance(report),
    ]
    data = json.dumps(_data(report)).replace("</", "<\\/")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>sparse_attn recipe</title><style>{_file('css')}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + f'\n</main><script type="application/json" id="data">{data}</script>'
        + f"<script>{_file('js')}</script></body></html>\n"
    )


def _file(kind: str) -> str:
    return Path(__file__).with_name(f"report_page.{kind}").read_text(encoding="utf-8")


def _data(report: Report) -> dict[str, Any]:
    from sparse_attn.search.report import packed

    def numbers(h: Head) -> dict[str, Any]:
        times = {"time": h.time_us, "dense": h.dense_time_us}
        return {"setting": h.setting, "error": h.error, "recall": h.recall, **times}

    layers = [{"title": title, "heads": [numbers(h) for h in heads]} for title, heads in report.layers]
    return {
        "grid": GRID, "settings": report.settings, "layers": layers,
        "truth": packed(report.maps, "truth"), "kept": packed(report.maps, "kept"),
    }  # fmt: skip


def _cards(report: Report) -> str:
    from sparse_attn.search.report import layer_speedups

    s = report.summary
    cards: list[tuple[str, str]] = []
    if s:
        cards += [
            (f"{s['density']:.3f}", "of the visible pairs attended"),
            (
                f"{s['dense_time_us'] / s['time_us']:.2f}x",
                "predicted speedup of attention, calls and copies included",
            ),
            (
                f"{s['recall']:.3f}",
                f"mean mass recall; worst 1 % of rows of any head {s['recall_worst']:.3f}",
            ),
            (f"{s['relative_error']:.3f}", "relative error, rms over heads"),
        ]
        kept = [t for t in s["trials"] if abs(t["budget"] - s["error"]) <= 0.05 * t["budget"]]
        if kept:
            cost, what = _came_of(kept[-1], s)
            cards.append((cost, f"{what} where it was tried"))
    else:
        known = [x for x in layer_speedups(report) if x is not None]
        if known:
            cards.append((f"{len(known) / sum(1 / x for x in known):.2f}x", "predicted speedup of attention"))
    dense = sum(count for label, _, count in report.settings if label.split()[0] == "dense")
    total = sum(count for _, _, count in report.settings)
    cards.append((f"{total - dense} of {total}", "heads are sparse"))
    inner = "".join(f'<div class="card"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in cards)
    return f'<div class="cards">{inner}</div>'


def _maps(report: Report) -> str:
    """A map for each phase; its title where there are several."""
    maps = [(title, _map(report, numbers)) for title, numbers in report.phases]
    if len(maps) == 1:
        return maps[0][1]
    return "".join(f"<h3>{escape(title)}</h3>{text}" for title, text in maps)


def _map(report: Report, numbers: list[int]) -> str:
    from sparse_attn.search.report import layer_errors, layer_speedups

    width = max(len(report.layers[n][1]) for n in numbers)
    heads_row = "".join(f"<th>{n}</th>" for n in range(width))
    head = f'<th></th>{heads_row}<th class="num">error</th><th class="num speed">speed</th>'
    rows, errors, speedups = [], layer_errors(report), layer_speedups(report)
    for n in numbers:
        (title, heads), error, speed = report.layers[n], errors[n], speedups[n]
        cells = "".join(
            f'<td style="background:{report.settings[h.setting][1]}">'
            f'<button data-layer="{n}" data-head="{i}" '
            f'aria-pressed="false" aria-label="layer {escape(title)} head {i}" '
            f'title="layer {escape(title)}, head {i}: {escape(report.settings[h.setting][0])}"></button></td>'
            for i, h in enumerate(heads)
        )
        cells += "<td></td>" * (width - len(heads))
        times = f"{speed:.1f}x" if speed else ""
        tail = f'<td class="num">{_say(error, ".3f")}</td><td class="num speed">{times}</td>'
        rows.append(f"<tr><th>{report.recipe.layers[n].layer}</th>{cells}{tail}</tr>")
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table class="map">{body}</table></div>'


def _say(x: float | None, form: str) -> str:
    return "" if x is None else format(x, form)


def _legend(report: Report) -> str:
    items = "".join(
        f'<li><i style="background:{colour}"></i>{escape(label)} <span class="soft">{count}</span></li>'
        for label, colour, count in report.settings
    )
    return f'<ul class="legend">{items}</ul>'


_TRUTH = "Dense attention: queries down, keys across; darker is more mass (logarithmic)."
_KEPT = "The chosen pattern, light blue, over it; red is mass that no list holds."


def _detail(report: Report) -> str:
    pictures = ""
    if report.maps:
        pictures = "".join(
            f'<figure><canvas id="{name}"></canvas><figcaption>{text}</figcaption></figure>'
            for name, text in (("truth", _TRUTH), ("kept", _KEPT))
        )
        pictures = f'<div class="pair">{pictures}</div>'
    return (
        '<section id="detail"><h2 id="what"></h2><p class="soft" id="numbers"></p>'
        f'{pictures}<p class="soft">Choose a head in the map.</p></section>'
    )


# -- the curve ------------------------------------------------------------------------------------------

_W, _H, _LEFT, _BOTTOM = 760, 300, 60, 40


def _curve(s: dict[str, Any]) -> str:
    from sparse_attn.search.report import error_unit

    if not s.get("pareto"):
        return ""
    lines = [
        ("this search", "#0072b2", [(x["error"], x["time_us"]) for x in s["pareto"]]),
        ("paper's rule, best penalty", "#e69f00", [(x["budget"], x["best_us"]) for x in s["greedy"]]),
        ("paper's rule, penalty 0.5", "#cc79a7", [(x["budget"], x["paper_us"]) for x in s["greedy"]]),
    ]
    errors = [e for _, _, points in lines for e, _ in points if e > 0]
    low, high = math.log(min(errors)), math.log(max(errors))
    top = s["dense_time_us"] * 1.08

    def place(e: float, t: float) -> tuple[float, float]:
        x = _LEFT + (math.log(max(e, min(errors))) - low) / max(high - low, 1e-9) * (_W - _LEFT - 20)
        return x, (_H - _BOTTOM) * (1 - t / top) + 8

    right, height = _W - 20, f"{place(errors[0], s['dense_time_us'])[1]:.1f}"
    line = f'x1="{_LEFT}" x2="{right}" y1="{height}" y2="{height}"'
    marks = [f'<line {line} stroke="#9aa4b1" stroke-dasharray="4 4"/>']
    for name, colour, points in lines:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in points))
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        marks += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{escape(name)}: error '
            f"{p[0]:.3g}, "
            f"{p[1] / 1e3:.1f} ms</title></circle>"
            for p, (x, y) in ((p, place(*p)) for p in points)
        ]
    x, y = place(s["error"], s["time_us"] - s["copies_us"])
    marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8" fill="none" stroke="#1c2430" stroke-width="2"/>')
    axis = "".join(
        f'<text x="{_LEFT - 6}" y="{place(errors[0], t)[1] + 4:.1f}" text-anchor="end">'
        f"{t / 1e3:.0f} ms</text>"
        for t in (0, s["dense_time_us"] / 2, s["dense_time_us"])
    )
    axis += "".join(
        f'<text x="{place(e, 0)[0]:.1f}" y="{_H - 14}" text-anchor="{at}">{e:.2g}</text>'
        for e, at in (
            (math.exp(low), "start"),
            (math.exp((low + high) / 2), "middle"),
            (math.exp(high), "end"),
        )
    )
    legend = "".join(f'<li><i style="background:{c}"></i>{escape(n)}</li>' for n, c, _ in lines)
    return (
        "<section><h2>Predicted time against error</h2>"
        f'<div class="scroll"><svg viewBox="0 0 {_W} {_H}" role="img" aria-label="time against error">'
        f"{axis}{''.join(marks)}</svg></div>"
        f'<ul class="legend">{legend}<li><i class="ring"></i>this recipe</li></ul>'
        f'<p class="soft">Error: {escape(error_unit(s))}. The dashed line is dense. The paper\'s rule takes '
        "the epsilon that is fastest at each error.</p></section>"
    )


def _came_of(trial: dict[str, float], s: dict[str, Any]) -> tuple[str, str]:
    """What a recipe cost the model: a number and what it counts."""
    if "changed" in trial:
        tokens = "masked" if s.get("schedule") else "next"
        return f"{100 * trial['changed']:.2f} %", f"changed {tokens} tokens"
    return f"{100 * math.expm1(trial['rise']):+.2f} %", "perplexity"


def _trials(s: dict[str, Any]) -> str:
    if not s.get("trials"):
        return ""
    unit = " nats" if s["weight"] == "divergence" else ""
    rows = "".join(
        f"<dt>{t['budget']:.5f}{unit}</dt><dd>{' '.join(_came_of(t, s))}, {t['time_us'] / 1e3:.1f} ms</dd>"
        for t in s["trials"]
    )
    note = '<p class="soft">Error budget, and what came of it.</p>'
    return f"<section><h2>Recipes tried on the model</h2>{note}<dl>{rows}</dl></section>"


def _provenance(report: Report) -> str:
    recipe, s = report.recipe, report.summary
    rows = {
        "recipe made by": recipe.created_by,
        "model's config": recipe.model.config_hash,
        "calibration data": recipe.calibration_hash or "not noted",
        "phases": "; ".join(title for title, _ in report.phases),
    }
    if s:
        table = s["table"]
        rule = {k: v for k, v in s["rule"].items() if v is not None and k != "name"}
        rows |= {
            "rule": s["rule"]["name"] + " " + ", ".join(f"{k} {v:g}" for k, v in rule.items()),
            "samples": f"{s['samples']} of {s['length']} tokens, seed {s['seed']}",
            "candidates": ", ".join(c["label"] for c in s["candidates"]),
            "times": f"{table['device']}, measured on {table['threads']} thread(s), {table.get('date', '')}",
        }
    if schedule := s.get("schedule"):
        rows["denoising"] = (
            f"{schedule['num_steps']} steps of {schedule['branches']} pass(es), of each phase at most "
            f"{schedule['measured']} measured; times are of all passes"
        )
    inner = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in rows.items())
    return f"<section><h2>Where this comes from</h2><dl>{inner}</dl></section>"
