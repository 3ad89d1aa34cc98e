"""`sparse-attn recipe show FILE`: a recipe as a map of layers and heads."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparse_attn.methods.s2 import NO_SHARD
from sparse_attn.recipe import HeadGroup, LayerPlan, Recipe
from sparse_attn.recipe_check import encode_config

# One letter a setting: dense is a dot; past the last letter all others share "?".
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red", "bright_cyan", "bright_green")


class Action(StrEnum):
    show = "show"


def recipe_command(
    action: Annotated[Action, typer.Argument(help="show: draw the recipe.")],
    file: Annotated[Path, typer.Argument(help="The recipe's JSON file.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as plain data.")] = False,
) -> None:
    """Draw a recipe: which method each head of each layer runs, expected error and speed."""
    try:
        recipe = Recipe.load(file)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(summary(recipe), indent=1))
    else:
        draw(recipe, Console())


# -- numbers ----------------------------------------------------------------------------------------


def layer_numbers(plan: LayerPlan) -> dict[str, float | None]:
    """What a layer is expected to do: its worst head's error and recall, its time and its speedup over
    dense. None where a group does not tell."""
    error, recall = _all(plan, "relative_error"), _all(plan, "mass_recall")
    time, dense = _all(plan, "time_us"), _all(plan, "dense_time_us")
    return {
        "worst_error": None if error is None else max(error),
        "worst_recall": None if recall is None else min(recall),
        "time_us": None if time is None else sum(time),
        "speedup": sum(dense) / sum(time) if time and dense and sum(time) > 0 else None,
    }


def _all(plan: LayerPlan, name: str) -> list[float] | None:
    numbers = [getattr(group, name) for group in plan.groups]
    return None if any(x is None for x in numbers) else [y for x in numbers for y in x]


def summary(recipe: Recipe) -> dict[str, Any]:
    """What `show` draws, as plain data."""
    names = _names(recipe)
    layers = []
    for plan in recipe.layers:
        letters = _letters(plan, names)
        place = {"layer": plan.layer, "phase": plan.phase, "steps": plan.steps}
        layers.append({**place, "heads": letters, **layer_numbers(plan)})
    legend = {letter: text for text, letter in names.items()}
    return {"legend": legend, "heads_by_setting": _counts(recipe, names), "layers": layers}


def setting_text(group: HeadGroup) -> str:
    """The method and those of its settings that are not at their default; "s2 block_size=32". An S2 whose
    stride no sequence reaches is what it then is, a window with a sink: "s2 window 512+64, blocks of 64"."""
    plain = encode_config(group.config, {}, "")
    if group.method == "s2" and plain["vert_stride"] >= NO_SHARD:
        block, local, sink = (plain[x] for x in ("block_size", "local_blocks", "sink_blocks"))
        return f"s2 window {(local - 1) * block}+{sink * block}, blocks of {block}"
    defaults = {f: x.default for f, x in type(group.config).__dataclass_fields__.items()}
    parts = [f"{k}={_short(v)}" for k, v in plain.items() if k not in defaults or defaults[k] != v]
    return " ".join([group.method, *parts])


def _short(value: Any) -> str:
    if isinstance(value, dict) and "pattern" in value:
        rest = ",".join(f"{k}={_short(v)}" for k, v in value.items() if k != "pattern" and v is not None)
        return f"{value['pattern']}({rest})" if rest else value["pattern"]
    if isinstance(value, dict):
        return f"<{next(iter(value))}>"
    if isinstance(value, list):
        return "[" + ",".join(map(_short, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _names(recipe: Recipe) -> dict[str, str]:
    """Setting -> letter, in order of first use."""
    names: dict[str, str] = {}
    for group in (group for plan in recipe.layers for group in plan.groups):
        text = setting_text(group)
        if text not in names:
            used = sum(letter != "." for letter in names.values())
            letter = _LETTERS[used] if used < len(_LETTERS) else "?"
            names[text] = "." if group.method == "dense" else letter
    return names


def _letters(plan: LayerPlan, names: dict[str, str]) -> str:
    of_head = {head: names[setting_text(group)] for group in plan.groups for head in group.heads}
    return "".join(of_head[head] for head in sorted(of_head))


def _counts(recipe: Recipe, names: dict[str, str]) -> dict[str, int]:
    counts = dict.fromkeys(names, 0)
    for group in (group for plan in recipe.layers for group in plan.groups):
        counts[setting_text(group)] += len(group.heads)
    return counts


def by_steps(recipe: Recipe) -> list[tuple[str, list[LayerPlan]]]:
    """(title, plans) of each phase, of denoising for each range of steps: "denoising, steps 0-9 of 50"."""
    groups: dict[tuple[str, Any], list[LayerPlan]] = {}
    for plan in recipe.layers:
        groups.setdefault((plan.phase, plan.steps), []).append(plan)
    order = sorted(groups, key=lambda x: (recipe.phases.index(x[0]), x[1] or (0, 0)))
    return [(_title(phase, steps, recipe.num_steps), groups[phase, steps]) for phase, steps in order]


def _title(phase: str, steps: tuple[int, int] | None, num_steps: int | None) -> str:
    if phase != "denoising" or num_steps is None:
        return phase
    if steps is None:
        return f"{phase}, all {num_steps} steps"
    span = f"step {steps[0]}" if steps[1] == steps[0] + 1 else f"steps {steps[0]}-{steps[1] - 1}"
    return f"{phase}, {span} of {num_steps}"


# -- drawing ----------------------------------------------------------------------------------------


def draw(recipe: Recipe, console: Console) -> None:
    """Print the model, one table a phase (of denoising, a range of steps) and the legend."""
    model, names = recipe.model, _names(recipe)
    key_heads = f" ({model.num_kv_heads} key heads)" if model.num_kv_heads != model.num_heads else ""
    lines = [
        f"{model.architecture}: {model.num_layers} layers x {model.num_heads} heads{key_heads}, "
        f"head size {model.head_dim}",
        f"made by {recipe.created_by}; calibration data {recipe.calibration_hash or 'not recorded'}",
    ]
    if recipe.partial:
        lines.append("partial: layers and steps that are not listed run dense")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for title, plans in by_steps(recipe):
        console.print(_phase_table(title, plans, names))
        if total := _total(plans, "all layers"):
            console.print(total, markup=False, highlight=False, soft_wrap=True)
    denoising = [plan for plan in recipe.layers if plan.phase == "denoising"]
    by_range = any(plan.steps for plan in denoising) and not recipe.partial
    if total := _total(denoising, "all layers and steps", recipe.num_steps) if by_range else "":
        console.print(total, markup=False, highlight=False, soft_wrap=True)
    counts = _counts(recipe, names)
    for text, letter in names.items():
        entry = Text(f"  {letter}  ", style=_colour(letter))
        console.print(entry.append(f"{text}  ({counts[text]} heads)", style="default"), soft_wrap=True)


def _phase_table(title: str, plans: list[LayerPlan], names: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("heads from 0", overflow="fold")
    for name in ("worst error", "worst recall", "time us", "speedup"):
        table.add_column(name, justify="right", no_wrap=True)
    for plan in plans:
        numbers = layer_numbers(plan)
        heads = Text()
        for letter in _letters(plan, names):
            heads.append(letter, style=_colour(letter))
        table.add_row(
            str(plan.layer), heads, _number(numbers["worst_error"], ".2%"),
            _number(numbers["worst_recall"], ".4f"), _number(numbers["time_us"], ".1f"),
            _number(numbers["speedup"], ".2f", "x"),
        )  # fmt: skip
    return table


def _total(plans: list[LayerPlan], of: str, num_steps: int | None = None) -> str:
    """Over some plans, where all tell their times; with `num_steps`, each as often as it has steps."""
    new = old = 0.0
    for plan in plans:
        first, end = plan.steps or (0, num_steps or 1)
        count = 1 if num_steps is None else end - first
        time, dense = _all(plan, "time_us"), _all(plan, "dense_time_us")
        if time is None or dense is None:
            return ""
        new, old = new + count * sum(time), old + count * sum(dense)
    return f"{of}: {new:.1f} us, dense {old:.1f} us: {old / new:.2f}x" if new > 0 else ""


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _colour(letter: str) -> str:
    at = _LETTERS.find(letter)
    return "dim" if at < 0 else _COLOURS[at % len(_COLOURS)]
