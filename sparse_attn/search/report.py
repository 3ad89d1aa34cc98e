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

from sparse_attn.recipe import HeadGroup, LayerPlan, Recipe
from sparse_attn.recipe_command import by_steps, setting_text
from sparse_attn.recipe_files import write_whole
from sparse_attn.search.report_page import page
from sparse_attn.search.work import map_path

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
        phases: (title, numbers of the plans) of each map: a phase, or a range of denoising steps.
        summary: what the search noted, or {}.
        maps: plan's number -> {"truth", "kept"} uint8 [heads, GRID, GRID] of the chosen patterns, or {}.
    """

    recipe: Recipe
    settings: list[tuple[str, str, int]]
    layers: list[tuple[str, list[Head]]]
    phases: list[tuple[str, list[int]]]
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
        if _chosen(recipe, summary) is None:
            if work is not None:
                raise ValueError(f"report: {folder} belongs to another recipe than {path}.")
            summary = {}
    chosen = (_chosen(recipe, summary) if summary else None) or {}
    settings, number = _settings(recipe, summary, chosen)
    layers = [
        (_title(plan), _heads([(g, number[name]) for g, name in _named(n, plan, summary, chosen)]))
        for n, plan in enumerate(recipe.layers)
    ]
    place = {id(plan): n for n, plan in enumerate(recipe.layers)}
    phases = [(title, [place[id(plan)] for plan in plans]) for title, plans in by_steps(recipe)]
    maps = _maps(recipe, summary, chosen, folder)
    return Report(recipe, settings, layers, phases, summary, maps)


def _phase_of(plan: LayerPlan, summary: dict[str, Any]) -> int | None:
    """The number of a plan's phase in a search by steps, None in another.

    Raises:
        ValueError: the search had no such phase.
    """
    ranges = (summary.get("schedule") or {"ranges": [None]})["ranges"]
    number = (ranges if len(ranges) > 1 else [None]).index(None if plan.steps is None else list(plan.steps))
    return number if summary.get("schedule") else None


def _chosen(recipe: Recipe, summary: dict[str, Any]) -> dict[int, list[int]] | None:
    """plan's number -> candidate of each head, if the summary is this recipe's."""
    heads, found, result = summary["heads"], {}, {}
    phases = summary.get("phases") or [0] * len(summary["layers"])
    for n, place in enumerate(zip(phases, summary["layers"], strict=True)):
        found[place] = summary["choice"][n * heads : (n + 1) * heads]
    for n, plan in enumerate(recipe.layers):
        try:
            own = found.get((_phase_of(plan, summary) or 0, plan.layer))
        except ValueError:
            return None
        if own is None or len(own) != plan.num_heads:
            return None
        for group in plan.groups:
            if {summary["candidates"][own[h]]["method"] for h in group.heads} != {group.method}:
                return None
        result[n] = own
    return result


def _title(plan: LayerPlan) -> str:
    steps = "" if plan.steps is None else f" steps {plan.steps[0]}-{plan.steps[1] - 1}"
    return f"{plan.layer}{steps}"


def _named(
    n: int, plan: LayerPlan, summary: dict[str, Any], chosen: dict[int, list[int]]
) -> list[tuple[HeadGroup, str]]:
    """The groups of a plan with the names of their settings: the search's labels, where they are known. (A
    candidate that begins with its phase, as SparseD, has other settings in each, but one label.)"""
    if not chosen:
        return [(group, setting_text(group)) for group in plan.groups]
    labels = [x["label"] for x in summary["candidates"]]
    return [(group, labels[chosen[n][group.heads[0]]]) for group in plan.groups]


def _settings(
    recipe: Recipe, summary: dict[str, Any], chosen: dict[int, list[int]]
) -> tuple[list[tuple[str, str, int]], dict[str, int]]:
    """(name, colour, heads) of each setting, and its number by its name."""
    counts: dict[str, int] = {}
    dense = set()
    for n, plan in enumerate(recipe.layers):
        for group, name in _named(n, plan, summary, chosen):
            counts[name] = counts.get(name, 0) + len(group.heads)
            dense |= {name} if group.method == "dense" else set()
    order = sorted(counts, key=lambda x: (-counts[x], x))
    colours = iter(COLOURS * (len(order) // len(COLOURS) + 1))
    settings = [(x, DENSE_COLOUR if x in dense else next(colours), counts[x]) for x in order]
    return settings, {x: n for n, x in enumerate(order)}


def _heads(groups: list[tuple[HeadGroup, int]]) -> list[Head]:
    """Of groups with the numbers of their settings."""
    heads: dict[int, Head] = {}
    for group, number in groups:
        columns = (group.relative_error, group.mass_recall, group.time_us, group.dense_time_us)
        for n, head in enumerate(group.heads):
            heads[head] = Head(number, *(None if x is None else x[n] for x in columns))
    return [heads[h] for h in sorted(heads)]


def _maps(
    recipe: Recipe, summary: dict[str, Any], chosen: dict[int, list[int]], folder: Path
) -> dict[int, dict[str, np.ndarray]]:
    found = {}
    for n, own in chosen.items():
        plan = recipe.layers[n]
        path = map_path(folder, plan.layer, _phase_of(plan, summary))
        if path.is_file():
            with np.load(path) as data:
                kept = data["kept"][own, np.arange(len(own))]
                found[n] = {"truth": data["truth"], "kept": kept}
    return found


def packed(maps: dict[int, dict[str, np.ndarray]], name: str) -> dict[int, str]:
    """plan's number -> base64 of uint8 [heads, GRID, GRID]"""
    return {n: base64.b64encode(x[name].tobytes()).decode() for n, x in maps.items()}


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
    from matplotlib.ticker import MaxNLocator

    width, count = max(len(heads) for _, heads in report.layers), len(report.phases)
    figure = plt.figure(figsize=(15, max(6, 3 * count)), layout="constrained")
    grid = figure.add_gridspec(count, 4, width_ratios=(3, 1.5, 1.5, 3))
    colours = ListedColormap([colour for _, colour, _ in report.settings])
    errors, speedups = layer_errors(report), layer_speedups(report)
    for row, (title, numbers) in enumerate(report.phases):
        axes = [figure.add_subplot(grid[row, n]) for n in range(3)]
        cells = np.full((len(numbers), width), np.nan)
        for y, n in enumerate(numbers):
            heads = report.layers[n][1]
            cells[y, : len(heads)] = [h.setting for h in heads]
        axes[0].imshow(cells, cmap=colours, vmin=-0.5, vmax=len(report.settings) - 0.5, aspect="auto")
        axes[0].set(title=title if count > 1 else "pattern of each head", xlabel="head", ylabel="layer")
        for axis in (axes[0].xaxis, axes[0].yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        for bars, values, name in (
            (axes[1], errors, "relative error, rms of heads"),
            (axes[2], speedups, "predicted speedup"),
        ):
            bars.barh(range(len(numbers)), [values[n] or 0 for n in numbers], color="#0072b2")
            bars.set(title=name, ylim=(len(numbers) - 0.5, -0.5), xlim=(0, None), yticks=[])
    patches = [Patch(color=colour, label=f"{label} ({uses})") for label, colour, uses in report.settings]
    figure.legend(handles=patches, loc="outside lower center", ncols=5, fontsize="small", frameon=False)
    _draw_curve(figure.add_subplot(grid[:, 3]), report)
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
