"""The bidirectional half of the demo: SparseD and Sparse-vDiT on tensors with the structure of trained
attention, since no small diffusion model comes in a Python package.

Both find their pattern at one denoising step and use it at later ones. So here the pattern is found on
one set of queries and keys and measured on another, which has drifted from it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparse_attn.attend import Attended, attend
from sparse_attn.demo.candidates import Candidate
from sparse_attn.demo.heads import Picture, draw_head
from sparse_attn.demo.measure import Advance, Row, Tally, full_layout
from sparse_attn.demo.runs import engine_of, timed
from sparse_attn.methods import METHODS, Context
from sparse_attn.plan import Plan
from sparse_attn.testing_data import structured_qk

HEADS, HEAD_DIM, BLOCK = 8, 64, 64
LONGEST = 2048
LAYERS = 4  # independent draws, as if of several layers
NUM_STEPS = 64
DRIFT = 0.2  # share of a tensor that is new at the later step, in the Euclidean norm
FRAME, TEXT_LEN = (12, 20), 64  # 240 tokens a frame: like real models', no multiple of the block
LEAST_RECALL = 0.9
STRIPES = 64

# Patterns on offer to every video head; a stripe over the head's own strongest keys comes on top.
VIDEO_PATTERNS = (
    "diagonal:0.25",
    "diagonal:0.5",
    "diagonal:1",
    "multi_diagonal:0.0625",
    "multi_diagonal:0.125",
)


@dataclass(frozen=True)
class Shape:
    """What a structured method runs on."""

    name: str
    length: int
    kind: str
    grid: tuple[int, int, int] | None
    description: str


def bidirectional_shape(tokens: int) -> Shape:
    length = min(tokens, LONGEST)
    text = f"{length} tokens, the first half prompt"
    return Shape("diffusion LM shape", length, "bidirectional", None, text)


def video_shape(tokens: int) -> Shape:
    """As many whole frames as fit, at least two, and the text after them."""
    height, width = FRAME
    frames = max((min(tokens, LONGEST) - TEXT_LEN) // (height * width), 2)
    length = frames * height * width + TEXT_LEN
    text = f"{frames} frames of {height}x{width} tokens, then {TEXT_LEN} of text"
    return Shape("video model shape", length, "video", (frames, height, width), text)


@torch.no_grad()
def measure_structured(
    chosen: list[Candidate], tokens: int, *, device: torch.device, dtype: torch.dtype, advance: Advance
) -> tuple[list[Row], list[Picture], set[str]]:
    """Run every bidirectional candidate; `advance` is called LAYERS times for each.

    Returns:
        Rows, pictures of a few heads, and the engines that ran.
    """
    rows, pictures, engines = [], [], set()
    for c in chosen:
        shape = video_shape(tokens) if c.name == "vdit" else bidirectional_shape(tokens)
        find = _find_video if c.name == "vdit" else _find_text
        tally, dense_times, options = Tally(), defaultdict[str, list[float]](list), c.options
        for layer in range(LAYERS):
            early, late = _two_steps(shape, layer, device, dtype)
            v = torch.randn_like(late[1])
            seconds, (plan, finish, layer_options) = timed(partial(find, c, shape, *early), device)
            result, dense = _compare(plan, *late, v, tally, dense_times, turn=layer)
            result = Attended(finish(result.out, v), result.lse, None)
            tally.times["select"].append(seconds)
            tally.add(result, dense, plan.layout.density(per_head=True))
            engines.add(engine_of(*late, plan, False, HEAD_DIM**-0.5))
            if layer == 0:
                options = layer_options
                pictures += _pictures(c, plan, *late, options)
            advance()
        row = tally.row(c, shape.name, dense_times, options=options, uses=_uses(c))
        row.note += f" Input: queries and keys with the structure of trained attention, {shape.description}."
        rows.append(row)
    return rows, pictures, engines


def _two_steps(
    shape: Shape, seed: int, device: torch.device, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(q, k) at the step where the pattern is found, and at a later one."""
    options: dict[str, Any] = {"kind": shape.kind, "grid": shape.grid, "seed": seed}
    early = structured_qk(1, HEADS, shape.length, HEAD_DIM, **options, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(1000 + seed)
    late = []
    for x in early:
        noise = torch.randn(x.shape, generator=generator, device=device, dtype=torch.float32).to(dtype)
        noise *= x.norm() / noise.norm()
        late.append((1 - DRIFT**2) ** 0.5 * x + DRIFT * noise)
    return early, (late[0], late[1])


def _compare(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tally: Tally,
    dense_times: dict[str, list[float]],
    *,
    turn: int,
) -> tuple[Attended, Attended]:
    """Torch, our full layout and the plan, in rotating order, timed."""
    full = Plan(full_layout(q, k))
    work: list[tuple[str, Callable[[], Any]]] = [
        ("sdpa", lambda: scaled_dot_product_attention(q, k, v)),
        ("full", lambda: attend(q, k, v, full)),
        ("attend", lambda: attend(q, k, v, plan)),
    ]
    if turn == 0:
        for _, run in work:
            run()
    done = {}
    for name, run in work[turn % 3 :] + work[: turn % 3]:
        seconds, done[name] = timed(run, q.device)
        (tally.times if name == "attend" else dense_times)[name].append(seconds)
    return done["attend"], done["full"]


# -- finding patterns: (candidate, shape, q, k) -> plan, finish, options to show -------------------


def _find_text(c: Candidate, shape: Shape, q: Tensor, k: Tensor) -> tuple[Plan, Callable, dict[str, Any]]:
    """The first half is the prompt."""
    context = Context(prompt_len=shape.length // 2)
    plan = METHODS[c.name].select(q, k, c.config(), is_causal=False, scale=HEAD_DIM**-0.5, context=context)
    return plan, lambda out, v: out, c.options


def _find_video(c: Candidate, shape: Shape, q: Tensor, k: Tensor) -> tuple[Plan, Callable, dict[str, Any]]:
    """The offline search in small: of the patterns on offer, each head takes the sparsest that keeps
    LEAST_RECALL of its attention mass, or stays full."""
    method = METHODS[c.name]

    def plan_of(patterns: list[str]) -> tuple[Plan, Any]:
        config = method.config(patterns=tuple(patterns), grid=shape.grid, text_len=TEXT_LEN, block_size=BLOCK)
        return method.select(q, k, config, is_causal=False, scale=HEAD_DIM**-0.5, context=Context()), config

    dense = attend(q, k, k, Plan(full_layout(q, k))).lse
    offers = [[pattern] * HEADS for pattern in VIDEO_PATTERNS]
    offers.append(_stripes(q, k, dense, shape))
    best, least = ["full"] * HEADS, [1.0] * HEADS
    for offer in offers:
        plan, _ = plan_of(offer)
        recall = torch.exp(attend(q, k, k, plan).lse - dense)[0].mean(-1).tolist()
        density = plan.layout.density(per_head=True)[0].expand(HEADS).tolist()
        for h in range(HEADS):
            if recall[h] >= LEAST_RECALL and density[h] < least[h]:
                best[h], least[h] = offer[h], density[h]
    plan, config = plan_of(best)
    short = [p if "columns=" not in p else f"vertical_stripe:{p.count('/') + 1} keys" for p in best]
    options = {"grid": shape.grid, "text_len": TEXT_LEN, "block_size": BLOCK, "patterns": short}
    return plan, lambda out, v: method.finish(out, v, config) if method.finish else out, options


def _stripes(q: Tensor, k: Tensor, lse: Tensor, shape: Shape) -> list[str]:
    """For each head, the video keys that hold most attention over all queries, as single columns."""
    assert shape.grid is not None
    num_video = shape.length - TEXT_LEN
    specs = []
    for h in range(HEADS):
        p = torch.exp(q[0, h].float() @ k[0, h].float().T * HEAD_DIM**-0.5 - lse[0, h, :, None])
        top = p.sum(0)[:num_video].topk(min(STRIPES, num_video)).indices.sort().values
        specs.append("vertical_stripe:columns=" + "/".join(str(x) for x in top.tolist()) + ",single")
    return specs


def _uses(c: Candidate) -> int:
    """Over how many steps the cost of finding a pattern is spread."""
    if c.name != "sparsed":
        return NUM_STEPS
    return NUM_STEPS - 1 - c.config().switch_step(NUM_STEPS)


def _pictures(c: Candidate, plan: Plan, q: Tensor, k: Tensor, options: dict[str, Any]) -> list[Picture]:
    count = 4 if c.name == "vdit" else 2
    scale = HEAD_DIM**-0.5
    pictures = []
    for h in range(count):
        caption = options["patterns"][h] if "patterns" in options else "structured q and k, prompt first"
        title = f"{c.label}: head {h}"
        pictures.append(
            draw_head(
                title, caption, q[0, h], k[0, h], scale, {c.name: plan.layout}, h, HEADS, is_causal=False
            )
        )
    return pictures
