"""`sparse-attn demo`."""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sparse_attn.demo.candidates import SEARCH, Candidate, candidates
from sparse_attn.demo.heads import HeadPicker, Picture
from sparse_attn.demo.measure import Row, decoder_layers, measure_model
from sparse_attn.demo.model import LoadedModel, MissingAssetError, default_device, load_model
from sparse_attn.demo.report import render_html
from sparse_attn.demo.short_search import RECIPE_FILE, check_installed, short_search
from sparse_attn.demo.structured import LAYERS, measure_structured
from sparse_attn.demo.table import print_report
from sparse_attn.demo.text import TEXT_NAME, read_text
from sparse_attn.engines import ENGINES, use_engine
from sparse_attn.version import __version__

DEFAULT_TOKENS, SHORTEST = 4096, 256
# Plain PyTorch takes minutes where the C++ engine takes seconds.
TOKENS_WITHOUT_FAST_ENGINE = 1024
PACKAGES = ("torch", "transformers", "triton", "numpy")


def demo_command(
    tokens: Annotated[
        int | None, typer.Option(help=f"Tokens that the model reads; default {DEFAULT_TOKENS}.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Comma-separated, of blasst,anchor,s2,search,sparsed,vdit; default: all."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="A transformers model directory; default: SmolLM2-135M-Instruct.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where demo.json, demo.html and demo.recipe.json go.")] = Path(
        "."
    ),
    engine: Annotated[str | None, typer.Option(help=f"Insist on one of {', '.join(ENGINES)}.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print demo.json instead of the table.")] = False,
) -> None:
    """Run a real language model dense and with each sparse method, and say what each one costs and saves.

    The row of the search is a recipe, found in this run. Writes demo.json, demo.html and demo.recipe.json;
    needs no network.
    """
    messages = Console(stderr=True)
    try:
        report = run_demo(tokens, methods, model, output, engine, messages)
    except (MissingAssetError, ValueError, NotImplementedError) as error:
        messages.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        print_report(report)
        recipe = f"   recipe: {output / RECIPE_FILE}" if "search" in report else ""
        Console().print(
            f"\nPictures and details: {output / 'demo.html'}   numbers: {output / 'demo.json'}{recipe}"
        )


def run_demo(
    tokens: int | None,
    methods: str | None,
    model_directory: Path | None,
    output: Path,
    engine: str | None,
    messages: Console,
) -> dict[str, Any]:
    """Measure, write demo.json, demo.html and the recipe into `output`, and return what demo.json holds.

    Raises:
        MissingAssetError: the model or the text is not installed. ValueError: a bad argument.
        NotImplementedError: the engine asked for cannot run here.
    """
    started = time.perf_counter()
    chosen = candidates(methods)
    device = default_device(engine)
    tokens = _token_count(tokens, engine, device, messages)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    output.mkdir(parents=True, exist_ok=True)
    if any(c.name == SEARCH for c in chosen):
        check_installed()
    causal = [c for c in chosen if c.is_causal]
    bidirectional = [c for c in chosen if not c.is_causal]
    report: dict[str, Any] = {"provenance": _provenance(device, dtype), "tokens": tokens}
    rows: list[Row] = []
    pictures: list[Picture] = []
    engines: set[str] = set()
    with use_engine(engine) if engine else nullcontext(), _progress(messages) as progress:
        if causal:
            loaded, ids, text = _load(model_directory, tokens, device, dtype, progress)
            report |= {"model": loaded.name, "text": TEXT_NAME}
            causal, found = _searched(causal, loaded, text, tokens, output, progress)
            report |= found
            causal_rows, dense, drawn = _run_model(loaded, ids, causal, progress)
            engines |= set(dense.pop("engines"))
            report["dense"] = dense
            rows, pictures = rows + causal_rows, pictures + drawn
        if bidirectional:
            task = progress.add_task("structured queries and keys", total=LAYERS * len(bidirectional))
            more, drawn, used = measure_structured(
                bidirectional, tokens, device=device, dtype=dtype, advance=lambda: progress.advance(task)
            )
            rows, pictures, engines = rows + more, pictures + drawn, engines | used
    report["provenance"]["engine"] = ", ".join(sorted(engines))
    report["methods"] = [asdict(row) for row in rows]
    report["seconds"] = round(time.perf_counter() - started, 1)
    (output / "demo.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (output / "demo.html").write_text(render_html(report, pictures), encoding="utf-8")
    return report


def _token_count(tokens: int | None, engine: str | None, device: torch.device, messages: Console) -> int:
    if tokens is not None:
        if tokens < SHORTEST:
            raise ValueError(f"demo: --tokens is {tokens}; it must be at least {SHORTEST}.")
        return tokens
    forced = engine or os.environ.get("SPARSE_ATTN_ENGINE")
    reasons = ENGINES["cpu"].why_off()
    if device.type == "cuda" or not (reasons or forced == "reference"):
        return DEFAULT_TOKENS
    why = "" if forced else f" (cpu engine: {'; '.join(reasons)})"
    messages.print(
        f"The fast CPU engine is not in use{why}; reading {TOKENS_WITHOUT_FAST_ENGINE} tokens instead of "
        f"{DEFAULT_TOKENS}. `sparse-attn build` compiles it; --tokens overrides.",
        style="yellow",
    )
    return TOKENS_WITHOUT_FAST_ENGINE


def _progress(messages: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
    )
    return Progress(*columns, TimeElapsedColumn(), console=messages)


def _load(
    directory: Path | None, tokens: int, device: torch.device, dtype: torch.dtype, progress: Progress
) -> tuple[LoadedModel, torch.Tensor, str]:
    task = progress.add_task("loading the model and the text", total=1)
    text = read_text()
    loaded = load_model(directory, device=device, dtype=dtype)
    longest = getattr(loaded.model.config, "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise ValueError(f"demo: --tokens is {tokens}; {loaded.name} reads at most {longest}.")
    numbers = loaded.encode(text[: tokens * 16])[:tokens]  # English runs to about 4 characters a token
    if len(numbers) < tokens:
        raise ValueError(f"demo: --tokens is {tokens}; the text has only {len(numbers)}.")
    progress.advance(task)
    return loaded, torch.tensor([numbers], device=device), text


def _searched(
    causal: list[Candidate], loaded: LoadedModel, text: str, tokens: int, output: Path, progress: Progress
) -> tuple[list[Candidate], dict[str, Any]]:
    """The rows, the search's with the recipe that it found; and {"search": what the report shows of it}."""
    rows, facts = [], {}
    for c in causal:
        if c.name == SEARCH:
            c, facts["search"] = short_search(c, loaded, text, tokens, progress)
            assert c.recipe is not None
            c.recipe.save(output / RECIPE_FILE)
        rows.append(c)
    return rows, facts


def _run_model(
    loaded: LoadedModel, ids: torch.Tensor, causal: list[Candidate], progress: Progress
) -> tuple[list[Row], dict[str, Any], list[Picture]]:
    passes = ["dense beside every method", *(c.label for c in causal)]
    num_layers = len(decoder_layers(loaded.model))
    tasks = [progress.add_task(name, total=num_layers, start=False) for name in passes]
    done = 0

    def advance() -> None:
        nonlocal done
        task = tasks[min(done // num_layers, len(tasks) - 1)]
        progress.start_task(task)
        progress.advance(task)
        done += 1

    picker = HeadPicker()
    rows, dense = measure_model(loaded.model, ids, causal, advance=advance, picker=picker)
    task = progress.add_task("drawing heads", total=1)
    pictures = picker.pictures()
    progress.advance(task)
    return rows, dense, pictures


def _provenance(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Where and with what the numbers were made."""
    versions = {"sparse_attn": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(terse=True),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": versions,
    }


def _processor() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
