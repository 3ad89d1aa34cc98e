"""`sparse-attn calibrate`: BLASST's thresholds for a model, as its checkpoint's config keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sparse_attn.demo.model import LoadedModel, MissingAssetError
from sparse_attn.integrations.patching import attention_modules
from sparse_attn.recipe import Recipe
from sparse_attn.recipe_files import write_whole
from sparse_attn.search.calibrate import Calibration, Sparsities, fit, recipe_layers
from sparse_attn.search.commands import DEMO, _Bar, load_language_model, read_calibration_text, text_samples
from sparse_attn.search.models import LanguageModel


def calibrate_command(
    model: Annotated[str, typer.Argument(help="A transformers model directory, or 'demo' (SmolLM2-135M).")],
    text: Annotated[Path | None, typer.Option(help="A text file; default: the demo's text.")] = None,
    out: Annotated[Path, typer.Option(help="Where the block is written.")] = Path(
        "sparse_attention_config.json"
    ),
    lengths: Annotated[str, typer.Option(help="Tokens of the samples, comma-separated.")] = "1024,2048,4096",
    samples: Annotated[int, typer.Option(help="Samples of each length.")] = 1,
    target: Annotated[float, typer.Option(help="Share of the tiles to skip in prefill.")] = 0.5,
    decode_target: Annotated[float, typer.Option(help="The same in decoding.")] = 0.5,
    decode_queries: Annotated[int, typer.Option(help="Last tokens of a sample read as decoding steps.")] = 16,
    block_m: Annotated[int, typer.Option(help="Queries in a tile of the kernel.")] = 128,
    block_n: Annotated[int, typer.Option(help="Keys in a tile of the kernel.")] = 128,
    recipe: Annotated[Path | None, typer.Option(help="Also write a recipe with these thresholds.")] = None,
    per_head: Annotated[
        bool, typer.Option("--per-head", help="In the recipe: a threshold for each head.")
    ] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Also put the block into the model's config.json.")
    ] = False,
) -> None:
    """Fit lambda = a * exp(b * sparsity) / L for a model from one dense pass over each sample.

    Reads nothing but the text; the block is the one that TensorRT-LLM and ModelOpt read.
    """
    messages, console = Console(stderr=True), Console()
    try:
        sizes = _lengths(lengths)
        if write and model == DEMO:
            raise ValueError("calibrate: --write needs a model directory.")
        loaded = load_language_model(model, max(sizes))
        seen = Sparsities(block_m=block_m, block_n=block_n, decode_queries=decode_queries)
        language = _measure(loaded, read_calibration_text(text), sizes, samples, seen, messages)
        found = calibration(seen, language, target, decode_target)
        block = found.to_block()
        write_whole(out, (json.dumps(block, indent=1) + "\n").encode())
        print_fits(found, console)
        console.print(f"block: {out}", highlight=False)
        if write:
            path = Path(model) / "config.json"
            config = json.loads(path.read_text()) | {"sparse_attention_config": block}
            write_whole(path, (json.dumps(config, indent=2) + "\n").encode())
            console.print(f"written into {path}", highlight=False)
        if recipe is not None:
            layers = recipe_layers(
                seen, language.fingerprint, target, per_head=per_head, whole=found.fits["prefill"]
            )
            Recipe(language.fingerprint, tuple(layers), language.calibration_hash).save(recipe)
            console.print(f"recipe: {recipe}", highlight=False)
    except (MissingAssetError, ValueError, NotImplementedError) as error:
        messages.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error


def _lengths(text: str) -> list[int]:
    try:
        sizes = sorted({int(x) for x in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < 2:
        raise ValueError(f"calibrate: --lengths is {text!r}; use numbers such as 1024,2048,4096.")
    return sizes


def _measure(
    loaded: LoadedModel, text: str, lengths: list[int], samples: int, seen: Sparsities, messages: Console
) -> LanguageModel:
    language = None
    with _Bar(messages) as bar:
        for length in lengths:
            ids = text_samples(loaded, text, length, samples).to(loaded.model.device)
            language = LanguageModel(loaded.model, ids)
            bar.stage(f"{length} tokens", samples)
            for sample in range(samples):
                language.run(sample, seen)
                bar.advance()
    assert language is not None
    return language


def calibration(
    seen: Sparsities, language: LanguageModel, target: float, decode_target: float
) -> Calibration:
    """Fits of all phases that were seen.

    Raises:
        ValueError: too few points in prefill, or a target out of range. Decoding without enough points is
            left out.
    """
    fits = {"prefill": fit(seen.points("prefill"))}
    targets = {"prefill": target}
    if seen.seen["decode"]:
        try:
            fits["decode"] = fit(seen.points("decode"))
            targets["decode"] = decode_target
        except ValueError:
            pass
    for phase, x in fits.items():
        x.threshold_scale(targets[phase])
    names = sorted({type(module).__name__ for _, module in attention_modules(language.model)})
    return Calibration(fits, targets, tuple(names))


def print_fits(found: Calibration, console: Console) -> None:
    for phase, x in found.fits.items():
        goal = found.target[phase]
        inside = x.low <= goal <= x.high
        scale = x.threshold_scale(goal)
        console.print(
            f"{phase}: lambda * L = {x.a:.4g} * exp({x.b:.4g} * sparsity), R2 {x.r2:.3f} over {x.points} "
            f"trials of {x.low:.0%} to {x.high:.0%}; at {goal:.0%}: lambda * L = {scale:.4g}"
            f"{'' if inside else ' (extrapolated)'}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
