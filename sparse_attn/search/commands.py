"""`sparse-attn search`: from a language model and a text to a recipe."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sparse_attn.demo.model import LoadedModel, MissingAssetError, default_device, load_model
from sparse_attn.demo.text import read_text
from sparse_attn.search.candidates import Shape, default_candidates, distinct, load_candidates
from sparse_attn.search.cost import CostTable
from sparse_attn.search.denoising import DenoisingModel
from sparse_attn.search.jobs import Jobs
from sparse_attn.search.models import LanguageModel
from sparse_attn.search.phases import read_phases
from sparse_attn.search.run import Budget, Found, PaperRule, Search, recipe_attention, sdpa_layer, search

DEMO = "demo"
CHARACTERS = 16  # of a text that are tokenised for each token wanted; English has about 4


def search_command(
    model: Annotated[str, typer.Argument(help="A transformers model directory, or 'demo' (SmolLM2-135M).")],
    text: Annotated[
        Path | None, typer.Option(help="A text file to calibrate on; default: the demo's text.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("recipe.json"),
    budget: Annotated[
        str | None,
        typer.Option(
            help="perplexity=1%, agreement=99% (of next tokens), error=0.05 (relative, root mean square) "
            "or divergence=0.01 (nats); default the first, with --steps the second."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a calibration sample.")] = 4096,
    samples: Annotated[int, typer.Option(help="Samples that candidates are measured on.")] = 1,
    checks: Annotated[
        int, typer.Option(help="Further samples that recipes are tried on; 0: on those measured.")
    ] = 1,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated: window and names of methods; default: all that fit.")
    ] = None,
    candidates: Annotated[
        Path | None, typer.Option(help="Your own candidates, a JSON list, beside these.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="measured (predicted time) or paper (Sparse-vDiT's Eq. 2).")
    ] = "measured",
    penalty: Annotated[float, typer.Option(help="lambda of the paper's rule.")] = 0.5,
    epsilon: Annotated[float, typer.Option(help="epsilon of the paper's rule.")] = 1.0,
    cost_table: Annotated[Path | None, typer.Option(help="Times of another device than this one's.")] = None,
    queries: Annotated[
        int | None, typer.Option(help="Measure on this many queries of a sample; default all.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Where measurements are kept; default OUT without .json + .search")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an earlier search.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and how long it takes.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: a GPU where there is one.")
    ] = None,
    jobs: Annotated[
        int, typer.Option(help="Processes that measure, each on layers of its own and a GPU of its own.")
    ] = 1,
    closed_loop: Annotated[
        bool,
        typer.Option("--closed-loop", help="Choose layers in order, each measured behind the chosen ones."),
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(help="A diffusion language model: fill the masks after the prompt in so many steps."),
    ] = None,
    prompt: Annotated[
        int | None, typer.Option(help="Tokens of a sample before the masks; default half (with --steps).")
    ] = None,
    mask_token: Annotated[
        int | None, typer.Option(help="Number of the mask's token; default: as the model's config says.")
    ] = None,
    phases: Annotated[
        str,
        typer.Option(help="Ranges of steps with settings of their own: 4, or where they begin: 0,3,12."),
    ] = "1",
    phase_steps: Annotated[int, typer.Option(help="Steps of each phase to measure on.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the tokens drawn for the divergence.")] = 0,
    held_out: Annotated[Path | None, typer.Option(help="Another text: report the perplexity on it.")] = None,
) -> None:
    """Find the cheapest attention of every layer and head that keeps a language model's output.

    With --steps, of every layer, head and phase of a diffusion language model.

    What is measured is kept beside the recipe; a search that was killed goes on with --resume. Ctrl-C
    writes a partial recipe of the layers that were measured.
    """
    messages = Console(stderr=True)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        budget = budget or ("perplexity=1%" if steps is None else "agreement=99%")
        rule: Budget | PaperRule = (
            PaperRule(penalty, epsilon) if _mode(mode) == "paper" else parse_budget(budget)
        )
        if steps is not None and held_out is not None:
            raise ValueError("search: --held-out tells a perplexity, which a diffusion model has not.")
        asked = Asked(model, text, tokens, samples, checks, device, steps, prompt, mask_token)
        loaded, language = asked.load()
        names = None if methods is None else [x.strip() for x in methods.split(",") if x.strip()]
        f = language.fingerprint
        shape = Shape(
            tokens, f.num_heads, f.num_kv_heads, f.head_dim, steps is None, device=language.device.type
        )
        own = [] if candidates is None else load_candidates(candidates)
        options = {
            "candidates": distinct([*default_candidates(shape, names), *own]),
            "table": None if cost_table is None else CostTable.load(cost_table),
            "num_queries": queries, "seed": seed, "resume": resume, "closed_loop": closed_loop,
            "phases": read_phases(phases), "measured_steps": phase_steps,
        }  # fmt: skip
        folder = out.with_name(f"{out.stem}.search") if work is None else work
        if dry_run:
            _say_plan(language, rule, options, folder, out, messages)
            return
        with _Bar(messages) as bar:
            found = search(
                language, rule, work=folder, jobs=Jobs(jobs, asked.load_for_job), progress=bar, **options
            )
        found.recipe.save(out)
        print_found(found, out, folder, Console())
        if held_out is not None:
            _held_out(loaded, language, found, held_out, tokens, Console())
    except (MissingAssetError, ValueError, NotImplementedError) as error:
        messages.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        messages.print("interrupted before any layer was measured; nothing was written.")
        raise typer.Exit(130) from None
    if found.recipe.partial:
        raise typer.Exit(130)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _mode(mode: str) -> str:
    if mode not in ("measured", "paper"):
        raise ValueError(f"search: --mode is {mode!r}; use measured or paper.")
    return mode


def parse_budget(text: str) -> Budget:
    """ "perplexity=1%" -> Budget(perplexity=0.01).

    Raises:
        ValueError: not of this form, or out of range.
    """
    name, _, number = text.partition("=")
    names = {"perplexity": "perplexity", "error": "relative_error"}
    names |= {name: name for name in ("divergence", "agreement")}
    try:
        value = float(number.strip().removesuffix("%")) * (0.01 if number.strip().endswith("%") else 1)
    except ValueError:
        value = -1.0
    if name.strip() not in names or not value > 0:
        raise ValueError(
            f"search: --budget is {text!r}; use perplexity=1%, agreement=99%, error=0.05 or divergence=0.01."
        )
    return Budget(**{names[name.strip()]: value})


# -- the model and its samples --------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """The options of the command that say what is searched."""

    model: str
    text: Path | None
    tokens: int
    samples: int
    checks: int
    device: str | None
    steps: int | None = None
    prompt: int | None = None
    mask_token: int | None = None

    def load(self) -> tuple[LoadedModel, LanguageModel]:
        """The model and its samples.

        Raises:
            MissingAssetError, ValueError: as `load_language_model`, `text_samples` and `DenoisingModel`.
        """
        if self.samples < 1 or self.checks < 0 or self.tokens < 2:
            raise ValueError("search: --samples and --tokens must be positive, --checks at least 0.")
        loaded = load_language_model(self.model, self.tokens, self.device)
        text = read_calibration_text(self.text)
        ids = text_samples(loaded, text, self.tokens, self.samples + self.checks).to(loaded.model.device)
        ids, check = ids[: self.samples], ids[self.samples :] if self.checks else None
        if self.steps is None:
            return loaded, LanguageModel(loaded.model, ids, check=check)
        mask = self.mask_token
        mask = getattr(loaded.model.config, "mask_token_id", None) if mask is None else mask
        if mask is None:
            raise ValueError(
                f"search: the config of {loaded.name} names no mask_token_id; pass --mask-token."
            )
        prompt = self.tokens // 2 if self.prompt is None else self.prompt
        how = {"num_steps": self.steps, "prompt_len": prompt, "mask_id": mask}
        return loaded, DenoisingModel(loaded.model, ids, check=check, **how)

    def load_for_job(self, rank: int) -> LanguageModel:
        """The model in another process, on the GPU that it has made the current one."""
        return self.load()[1]


def load_language_model(model: str, tokens: int, device: str | None = None) -> LoadedModel:
    """The named model in evaluation mode, in bfloat16 on a GPU, in float32 on a CPU.

    Args:
        device: "cpu" or "cuda"; default: a GPU where there is one.

    Raises:
        MissingAssetError: the demo's model is not installed.
        ValueError: no such device, no model there, or it reads fewer tokens.
    """
    place = _device(device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    loaded = load_model(None if model == DEMO else Path(model), device=place, dtype=dtype)
    longest = getattr(loaded.model.config, "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise ValueError(f"search: {tokens} tokens were asked for; {loaded.name} reads at most {longest}.")
    return loaded


def _device(name: str | None) -> torch.device:
    if name is None:
        return default_device()
    if name not in ("cpu", "cuda"):
        raise ValueError(f"search: --device is {name!r}; use cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("search: --device is cuda, and no GPU is visible to torch.")
    return torch.device(name)


def read_calibration_text(path: Path | None) -> str:
    """The text of a file, or the demo's.

    Raises:
        ValueError: it cannot be read.
    """
    if path is None:
        return read_text()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"search: {path}: {error}") from None


def text_samples(loaded: LoadedModel, text: str, tokens: int, count: int) -> torch.Tensor:
    """int64 [count, tokens]: stretches of a text that begin at even distances.

    Raises:
        ValueError: the text is too short.
    """
    rows = []
    for n in range(count):
        start = n * len(text) // count
        end = min(start + tokens * CHARACTERS, (n + 1) * len(text) // count)
        numbers = loaded.encode(text[start:end])[:tokens]
        if len(numbers) < tokens:
            raise ValueError(
                f"search: the text gives sample {n + 1} of {count} only {len(numbers)} of {tokens} tokens; "
                "pass a longer one, or fewer --samples, --checks or --tokens."
            )
        rows.append(numbers)
    return torch.tensor(rows)


# -- what is printed ------------------------------------------------------------------------------------


class _Bar:
    """Progress on a terminal, with the time left of each stage."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self.bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
        self.task: TaskID | None = None

    def __enter__(self) -> _Bar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def stage(self, name: str, total: int) -> None:
        self.task = self.bar.add_task(name, total=total)

    def advance(self) -> None:
        if self.task is not None:
            self.bar.advance(self.task)

    def note(self, text: str) -> None:
        self.bar.console.print(text, highlight=False)


def print_found(found: Found, out: Path, folder: Path, console: Console) -> None:
    s = found.summary
    faster = s["dense_time_us"] / s["time_us"]
    kind = "partial recipe" if found.recipe.partial else "recipe"
    console.print(
        f"{kind} {out}: attended density {s['density']:.3f}, predicted attention time "
        f"{s['time_us'] / 1e3:.1f} ms of {s['dense_time_us'] / 1e3:.1f} ms dense ({faster:.2f}x), mass "
        f"recall {s['recall']:.3f}, relative error {s['relative_error']:.3f}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    counts: dict[str, int] = {}
    for c in found.choice.tolist():
        label = found.candidates[c].label
        counts[label] = counts.get(label, 0) + 1
    for label, count in sorted(counts.items(), key=lambda x: -x[1]):
        console.print(f"  {count:4d} heads  {label}", highlight=False)
    console.print(
        f"measurements: {folder}   picture: sparse-attn report {out}", highlight=False, soft_wrap=True
    )


def _held_out(
    loaded: LoadedModel, language: LanguageModel, found: Found, path: Path, tokens: int, console: Console
) -> None:
    ids = text_samples(loaded, read_calibration_text(path), tokens, 1).to(language.ids.device)
    before = language.loss_on(ids, sdpa_layer)
    after = language.loss_on(ids, recipe_attention(found.recipe, language.phase))
    e = torch.tensor([before, after]).exp().tolist()
    console.print(
        f"held out, {path.name}: perplexity {e[0]:.4f} dense, {e[1]:.4f} with the recipe "
        f"({100 * (e[1] / e[0] - 1):+.2f} %)"
    )


def _say_plan(
    language: LanguageModel, rule: Budget | PaperRule, options: dict[str, Any], folder: Path, out: Path,
    console: Console,
) -> None:  # fmt: skip
    """What a search would do, and a guess of its time from one dense pass and one measured layer."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        trial = Search(language, scratch, **(options | {"resume": False}))
        trial.check_rule(rule)
        f, start = language.fingerprint, time.perf_counter()
        language.run(0, sdpa_layer)
        one_pass = time.perf_counter() - start
        start = time.perf_counter()
        trial.measure_first_layer()
        layer = time.perf_counter() - start
    moments = len(trial.schedule.moments(0))
    total = language.num_samples * (4 * one_pass + moments * f.num_layers * layer)
    total = (2 if trial.closed_loop else 1) * total + 5 * one_pass  # a closed loop measures again, or twice
    at = f" at {moments} passes in {len(trial.schedule.ranges)} phase(s)" if language.num_steps else ""
    console.print(
        f"would measure {len(trial.options)} candidates on {f.num_layers} layers of {f.num_heads} heads{at}, "
        f"{language.num_samples} sample(s) of {language.length} tokens, into {folder}; solve; write {out}.\n"
        f"about {total / 60:.0f} min: {one_pass:.1f} s a pass, {layer:.1f} s a layer for all candidates.\n"
        "candidates: " + ", ".join(c.label for c in trial.options),
        highlight=False, soft_wrap=True,
    )  # fmt: skip
