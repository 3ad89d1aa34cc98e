"""`sparse-attn report RECIPE`: one HTML file that shows what a recipe does and how it was found, and a PNG.

What the search kept beside the recipe (RECIPE without .json + .search) adds the attention of every head with
the pattern chosen for it, the curve of time against error, and where the numbers come from. A recipe alone
shows its own expectations.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from sparse_attn.recipe import LayerPlan, Recipe
from sparse_attn.recipe_command import setting_text
from sparse_attn.recipe_files import write_whole
from sparse_attn.search.report_page import page

# Settings in the order of their use take these; dense is always grey. Fair to common colour blindness.
COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7b5ea7", "#8c6d31",
    "#1b7837", "#9e9ac8", "#a63603", "#35978f", "#c51b7d", "#3182bd", "#fdae6b", "#74c476", "#636363",
    "#bcbd22", "#17becf",
)  # fmt: skip
DENSE_COLOUR = "#c9ced6"


@dataclass(frozen=True)
class Head:
    """One head in the report: its setting's number, and what is expected of it (None: not known)."""

    setting: int
    error: float | None
    recall: float | None
    time_us: float | None
    dense_time_us: float | None


@dataclass(frozen=True, eq=False)
class Report:
    """What the page shows.

    Attributes:
        recipe: as loaded.
        settings: (label, colour, number of heads) of each setting, most used first.
        layers: (title, heads) of each plan.
        summary: what the search noted, or {}.
        maps: layer -> {"truth", "kept"} uint8 [heads, GRID, GRID] of the chosen patterns, or {}.
    """

    recipe: Recipe
    settings: list[tuple[str, str, int]]
    layers: list[tuple[str, list[Head]]]
    summary: dict[str, Any]
    maps: dict[int, dict[str, np.ndarray]]


def report_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe's JSON file.")],
    out: Annotated[Path | None, typer.Option(help="The page; default: RECIPE with .html.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="The search's folder; default: RECIPE less .json, + .search.")
    ] = None,
    png: Annotated[bool, typer.Option(help="Also draw the map as PNG beside the page.")] = True,
) -> None:
    """Show a recipe as a page: the pattern of every head, errors, times, and how it was found."""
    messages = Console(stderr=True)
    try:
        report = load(recipe, work)
        target = recipe.with_suffix(".html") if out is None else out
        write_whole(target, page(report).encode())
        Console().print(f"{target}", highlight=False)
        if png:
            picture = target.with_suffix(".png")
            draw_png(report, picture)
            Console().print(f"{picture}", highlight=False)
    except (ValueError, OSError) as error:
        messages.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error


def load(path: Path, work: Path | None = None) -> Report:
    """Read a recipe and what the search kept.

    Raises:
        ValueError: no recipe, or `work` belongs to another recipe.
    """
    recipe = Recipe.load(path)
    folder = path.with_name(f"{path.stem}.search") if work is None else work
    summary: dict[str, Any] = {}
    if (folder / "summary.json").is_file():
        summary = json.loads((folder / "summary.json").read_text())
        if _choice(recipe, summary) is None:
            if work is not None:
                raise ValueError(f"report: {folder} belongs to another recipe than {path}.")
            summary = {}
    settings, number = _settings(recipe, summary)
    layers = [(_title(plan), _heads(plan, number)) for plan in recipe.layers]
    maps = _maps(recipe, summary, folder) if summary else {}
    return Report(recipe, settings, layers, summary, maps)


def _choice(recipe: Recipe, summary: dict[str, Any]) -> dict[int, list[int]] | None:
    """layer -> candidate of each head, if the summary is this recipe's."""
    heads, found = summary["heads"], {}
    for n, layer in enumerate(summary["layers"]):
        found[layer] = summary["choice"][n * heads : (n + 1) * heads]
    for plan in recipe.layers:
        own = found.get(plan.layer)
        if own is None or len(own) != plan.num_heads or plan.steps is not None:
            return None
        for group in plan.groups:
            if {summary["candidates"][own[h]]["method"] for h in group.heads} != {group.method}:
                return None
    return found


def _title(plan: LayerPlan) -> str:
    steps = "" if plan.steps is None else f" steps {plan.steps[0]}-{plan.steps[1] - 1}"
    return f"{plan.layer}{steps}"


def _settings(recipe: Recipe, summary: dict[str, Any]) -> tuple[list[tuple[str, str, int]], dict[str, int]]:
    """(label, colour, heads) of each setting, and its number by `setting_text`."""
    labels: dict[str, str] = {}
    counts: dict[str, int] = {}
    chosen = _choice(recipe, summary) if summary else None
    for plan in recipe.layers:
        for group in plan.groups:
            text = setting_text(group)
            counts[text] = counts.get(text, 0) + len(group.heads)
            labels[text] = text
            if chosen is not None:
                labels[text] = summary["candidates"][chosen[plan.layer][group.heads[0]]]["label"]
    order = sorted(counts, key=lambda x: (-counts[x], x))
    colours = iter(COLOURS * (len(order) // len(COLOURS) + 1))
    settings = [
        (labels[x], DENSE_COLOUR if x.split()[0] == "dense" else next(colours), counts[x]) for x in order
    ]
    return settings, {x: n for n, x in enumerate(order)}


def _heads(plan: LayerPlan, number: dict[str, int]) -> list[Head]:
    heads: dict[int, Head] = {}
    for group in plan.groups:
        columns = (group.relative_error, group.mass_recall, group.time_us, group.dense_time_us)
        for n, head in enumerate(group.heads):
            heads[head] = Head(number[setting_text(group)], *(None if x is None else x[n] for x in columns))
    return [heads[h] for h in sorted(heads)]


def _maps(recipe: Recipe, summary: dict[str, Any], folder: Path) -> dict[int, dict[str, np.ndarray]]:
    chosen = _choice(recipe, summary) or {}
    found = {}
    for layer, own in chosen.items():
        path = folder / "maps" / f"layer{layer:02d}.npz"
        if path.is_file():
            with np.load(path) as data:
                kept = data["kept"][own, np.arange(len(own))]
                found[layer] = {"truth": data["truth"], "kept": kept}
    return found


def packed(maps: dict[int, dict[str, np.ndarray]], name: str) -> dict[int, str]:
    """layer -> base64 of uint8 [heads, GRID, GRID]"""
    return {layer: base64.b64encode(x[name].tobytes()).decode() for layer, x in maps.items()}


# -- a picture ------------------------------------------------------------------------------------------


def draw_png(report: Report, path: Path) -> None:
    """The map of patterns beside error and speedup of every layer, and the curve of time against error.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError(
            "report: the PNG needs matplotlib: pip install matplotlib, or pass --no-png"
        ) from None
    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    rows, width = len(report.layers), max(len(heads) for _, heads in report.layers)
    grid = np.full((rows, width), np.nan)
    for n, (_, heads) in enumerate(report.layers):
        grid[n, : len(heads)] = [h.setting for h in heads]
    figure, axes = plt.subplots(1, 4, figsize=(15, 6), width_ratios=(3, 1.5, 1.5, 3), layout="constrained")
    colours = ListedColormap([colour for _, colour, _ in report.settings])
    axes[0].imshow(grid, cmap=colours, vmin=-0.5, vmax=len(report.settings) - 0.5, aspect="auto")
    axes[0].set(title="pattern of each head", xlabel="head", ylabel="layer")
    patches = [Patch(color=colour, label=f"{label} ({count})") for label, colour, count in report.settings]
    figure.legend(handles=patches, loc="outside lower center", ncols=5, fontsize="small", frameon=False)
    places = np.arange(rows)
    for axis, values, title in (
        (axes[1], layer_errors(report), "relative error, rms of heads"),
        (axes[2], layer_speedups(report), "predicted speedup"),
    ):
        axis.barh(places, [0 if x is None else x for x in values], color="#0072b2")
        axis.set(title=title, ylim=(rows - 0.5, -0.5), yticks=[])
    _draw_curve(axes[3], report)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_curve(axis: Any, report: Report) -> None:
    s = report.summary
    if not s.get("pareto"):
        axis.axis("off")
        return
    axis.plot(
        [x["error"] for x in s["pareto"]],
        [x["time_us"] / 1e3 for x in s["pareto"]],
        "o-",
        label="this search",
    )
    for name, label in (("best_us", "paper's rule, best penalty"), ("paper_us", "paper's rule, penalty 0.5")):
        axis.plot(
            [x["budget"] for x in s["greedy"]], [x[name] / 1e3 for x in s["greedy"]], "s--", label=label
        )
    axis.axhline(s["dense_time_us"] / 1e3, color="grey", lw=1, label="dense")
    axis.plot([s["error"]], [(s["time_us"] - s["copies_us"]) / 1e3], "k*", ms=14, label="this recipe")
    axis.set(
        xscale="log", xlabel=f"error ({error_unit(s)})", ylabel="predicted attention time, ms", ylim=(0, None)
    )
    axis.set_title("time against error")
    axis.legend(frameon=False, fontsize="small")


def error_unit(summary: dict[str, Any]) -> str:
    return "nats a token, estimated" if summary["weight"] == "divergence" else "mean squared relative error"


def layer_errors(report: Report) -> list[float | None]:
    """Root mean square over the heads of each layer."""
    result: list[float | None] = []
    for _, heads in report.layers:
        errors = [h.error for h in heads if h.error is not None]
        result.append(float(np.sqrt(np.mean(np.square(errors)))) if len(errors) == len(heads) else None)
    return result


def layer_speedups(report: Report) -> list[float | None]:
    """Dense time over time of each layer, calls and copies left out."""
    result: list[float | None] = []
    for _, heads in report.layers:
        pairs = [(h.dense_time_us, h.time_us) for h in heads if h.dense_time_us and h.time_us]
        whole = len(pairs) == len(heads)
        result.append(sum(d for d, _ in pairs) / sum(t for _, t in pairs) if whole else None)  # type: ignore[misc]
    return result
