"""BLASST: skip tiles whose largest logit lies far below the running maximum (arXiv 2512.12087).

Nothing is selected beforehand: the decision falls inside the attention kernel, tile by tile, so that
the plan is a layout (all tiles, or any other) and one number a head.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparse_attn.layout import SparseLayout
from sparse_attn.methods.base import Context, Method, run
from sparse_attn.plan import Plan


@dataclass(frozen=True, eq=False)
class BlasstConfig:
    """What BLASST needs to know; arguments as in `blasst_attention`.

    Raises:
        ValueError: a bad argument. That lambda is at most 1 can only be seen at the call, where
            `threshold_scale` meets the key length.
    """

    threshold: float | Tensor | None = None
    threshold_scale: float | Tensor | None = None
    block_m: int = 128
    block_n: int = 128
    layout: SparseLayout | None = None
    allow_unsafe: bool = False

    def __post_init__(self) -> None:
        problems = []
        if (self.threshold is None) == (self.threshold_scale is None):
            problems.append("give exactly one of threshold (lambda itself) and threshold_scale (lambda * S)")
        for name in ("threshold", "threshold_scale"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, Tensor):
                problems += _problems_of_tensor(name, value)
            elif isinstance(value, bool) or not isinstance(value, (int, float)):
                problems.append(f"{name} is {type(value).__name__}; it must be a float or a float tensor")
            elif not 0 <= value < math.inf:
                problems.append(f"{name} is {value}; it must be a finite number of at least 0")
        for name in ("block_m", "block_n"):
            if getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}; it must be at least 1")
        if problems:
            raise ValueError(f"blasst_attention: {'; '.join(problems)}.")


def _problems_of_tensor(name: str, value: Tensor) -> list[str]:
    problems = []
    if not value.is_floating_point():
        problems.append(f"{name} has dtype {value.dtype}; it must be a float tensor")
    if value.dim() not in (1, 2):
        problems.append(f"{name} has shape {tuple(value.shape)}; it must be [heads] or [batch, heads]")
    if not problems and _may_look_at(value):
        wrong = ~((value >= 0) & (value < math.inf))
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            problems.append(f"{name}{list(at)} is {value[at].item()}; it must be finite and at least 0")
    return problems


def _may_look_at(value: Tensor) -> bool:
    """Whether the numbers of a tensor may be read now. Reading them from a GPU makes the host wait, so
    that happens only where SPARSE_ATTN_DEBUG=1."""
    if torch.compiler.is_compiling():
        return False
    return value.device.type == "cpu" or os.environ.get("SPARSE_ATTN_DEBUG") == "1"


@dataclass(frozen=True, eq=False)
class BlasstStats:
    """How many tiles were attended.

    Attributes:
        kept: int64 [B, Hq], tiles that took part in the softmax.
        visited: int64 [B, Hq], tiles of the layout that lie at least partly under the causal edge.
    """

    kept: Tensor
    visited: Tensor

    @property
    def sparsity(self) -> Tensor:
        """float32 [B, Hq]: the share of the visited tiles that was skipped; 0 where none was visited."""
        return 1 - (self.kept / self.visited.clamp(min=1)).masked_fill(self.visited == 0, 1.0)


def select(
    query: Tensor,
    key: Tensor,
    config: BlasstConfig,
    *,
    is_causal: bool,
    scale: float,
    context: Context | None = None,
) -> Plan:
    """The layout (every tile unless the config names one) with ln(lambda) for each query head; without a skip
    rule where lambda is the number 0, which skips nothing.

    Raises:
        ValueError: lambda above 1 without `allow_unsafe`, or a tensor for other heads.
    """
    layout = config.layout
    if layout is None:
        layout = full_layout(query.shape[2], key.shape[2], config.block_m, config.block_n, query.device)
    if _is_number_zero(config.threshold) or _is_number_zero(config.threshold_scale):
        return Plan(layout)  # no engine then needs to vote
    return Plan(layout, _log_lambda(config, query, key.shape[2]))


def _is_number_zero(x: object) -> bool:
    """Whether x is known to be 0 without asking a device."""
    return isinstance(x, (int, float)) and x == 0


def _log_lambda(config: BlasstConfig, query: Tensor, key_length: int) -> Tensor:
    """float32 [B, Hq] on the device of `query`."""
    name, given, length = "threshold", config.threshold, 1
    if given is None:
        name, given, length = "threshold_scale", config.threshold_scale, key_length
    assert given is not None
    shape = query.shape[:2]
    if not isinstance(given, Tensor):
        value = given / length
        if value > 1 and not config.allow_unsafe:
            raise ValueError(_too_large(name, f"{given:g}", length, value))
        log = math.log(value) if value > 0 else -math.inf
        return torch.full(shape, log, dtype=torch.float32, device=query.device)
    if given.shape[-1] != shape[1] or (given.dim() == 2 and given.shape[0] not in (1, shape[0])):
        raise ValueError(
            f"blasst_attention: {name} has shape {tuple(given.shape)}; expected [{shape[1]}] or "
            f"[{shape[0]}, {shape[1]}] (batch, query heads)."
        )
    if given.device != query.device:
        raise ValueError(
            f"blasst_attention: {name} is on {given.device} but query is on {query.device}; move it there."
        )
    values = given.to(torch.float32) / length
    if not config.allow_unsafe:
        if _may_look_at(values) and (values > 1).any():
            raise ValueError(_too_large(name, "a tensor", length, values.max().item()))
        values = values.clamp(max=1)
    return values.log().expand(shape).contiguous()


def _too_large(name: str, given: str, length: int, value: float) -> str:
    over = f"{given} / {length} keys" if name == "threshold_scale" else given
    return (
        f"blasst_attention: {name} gives lambda = {over} = {value:g}, above 1: tiles that *raise* the "
        "running maximum would be skipped. Pass a smaller one, attend short inputs densely, or pass "
        "allow_unsafe=True (for speed tests)."
    )


def full_layout(L: int, S: int, block_m: int, block_n: int, device: torch.device) -> SparseLayout:
    """`SparseLayout.full`, remembered from call to call with its bounds."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or capturing:
        # What is made here belongs to the graph (traced tensors; memory that only a replay fills).
        return SparseLayout.full(L, S, block_m=block_m, block_n=block_n, device=device)
    if min(block_m, S) >= L:
        return _remembered_row(L, S, block_m, block_n, device)
    return _remembered_full_layout(L, S, block_m, block_n, device)


@lru_cache(maxsize=1024)
def _remembered_row(L: int, S: int, block_m: int, block_n: int, device: torch.device) -> SparseLayout:
    """One query block, as in decoding, where each of many sequences has its own length. Its bounds need not
    be searched for: the last query sees all blocks, and those are whole that end where the first one sees."""
    with torch.inference_mode(False):
        layout = SparseLayout.full(L, S, block_m=block_m, block_n=block_n, device=device)
        for is_causal, seen in ((False, S), (True, S - L + 1)):
            bounds = torch.tensor([[seen // block_n, layout.num_key_blocks]], dtype=torch.int32)
            layout._cache["block_bounds", is_causal] = bounds.to(device, non_blocking=True)
    return layout


@lru_cache(maxsize=16)
def _remembered_full_layout(L: int, S: int, block_m: int, block_n: int, device: torch.device) -> SparseLayout:
    # Tensors made under inference_mode could not serve a later call that needs gradients.
    with torch.inference_mode(False):
        layout = SparseLayout.full(L, S, block_m=block_m, block_n=block_n, device=device)
        layout.block_bounds(True)
        layout.block_bounds(False)
    return layout


def blasst_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: float | Tensor | None = None,
    *,
    threshold_scale: float | Tensor | None = None,
    block_m: int = 128,
    block_n: int = 128,
    layout: SparseLayout | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    allow_unsafe: bool = False,
    return_lse: bool = False,
    return_stats: bool = False,
    engine: str | None = None,
) -> Any:
    """Attention that skips the tiles which cannot matter (BLASST, arXiv 2512.12087, Algorithm 1).

    For each block of `block_m` queries, over the key blocks from left to right, with running maximum m::

        s = scale * q @ k_tile.T                      # always computed
        if every query has s.max() < m + ln(lambda):  # m as it was before this tile
            continue                                  # no exp, no p @ v: the tile changes nothing
        m, l, o = the usual online softmax update

    Skipped mass leaves numerator and denominator alike, so the output is renormalised over what was
    kept. lambda = 0 is dense attention, bit for bit on the same engine.

    Args:
        query: [B, Hq, L, D] float16, bfloat16 or float32; strides free while the last is 1.
        key: [B, Hkv, S, D]. value: [B, Hkv, S, Dv].
        threshold: lambda in [0, 1], on natural exponentials of scaled logits: a number, or a float tensor
            [Hq] or [B, Hq] on query's device. Values of tensors on a GPU are checked only where
            SPARSE_ATTN_DEBUG=1 (it makes the host wait); otherwise those above 1 count as 1, and
            negative ones and NaN never skip.
        threshold_scale: lambda times S, the length-free form that calibration gives (section 3.3; about
            1000 for prefill of an 8B model at half the tiles). Exactly one of the two is given.
        block_m, block_n: queries and keys in a tile, default 128. They decide which tiles fall: keep
            those that lambda was calibrated with. The Hopper engine takes 64 and 128 queries with
            128 keys, and is faster with 64. Ignored with `layout`.
        layout: read only its tiles; default all. Its columns, if any, are never skipped.
        is_causal: query i sees keys j <= i + S - L, **bottom-right aligned**
            (`scaled_dot_product_attention` is upper-left; they agree when L == S).
        scale: multiplies q.k; default D ** -0.5.
        enable_gqa: allow Hq to be a multiple of Hkv.
        allow_unsafe: accept lambda > 1, which skips tiles that raise the maximum a little.
        return_lse: also return the log-sum-exp over the kept tiles, float32 [B, Hq, L].
        return_stats: also return `BlasstStats`.
        engine: insist on an engine: "hopper", "triton", "cpu" or "reference".

    Returns:
        out [B, Hq, L, Dv]; with `return_lse` and `return_stats` a tuple (out, lse, stats), less what
        was not asked for.

    Raises:
        ValueError: a bad argument. NotImplementedError: no engine can run the call.

    Example:
        >>> out, stats = blasst_attention(q, k, v, threshold_scale=900.0, is_causal=True, return_stats=True)
        >>> stats.sparsity.mean()
    """
    config = BlasstConfig(threshold, threshold_scale, block_m, block_n, layout, allow_unsafe)
    result = run(
        BLASST, query, key, value, config, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
        engine=engine, want_kept=return_stats,
    )  # fmt: skip
    if not (return_lse or return_stats):
        return result.out
    parts: list[Any] = [result.out]
    if return_lse:
        parts.append(result.lse)
    if return_stats:
        if layout is None:
            layout = full_layout(query.shape[2], key.shape[2], block_m, block_n, query.device)
        parts.append(_stats(result.kept, layout, is_causal))
    return tuple(parts)


def _stats(kept: Tensor | None, layout: SparseLayout, is_causal: bool) -> BlasstStats:
    assert kept is not None
    batch, heads = kept.shape[:2]
    visible = layout.block_bounds(is_causal)[:, 1].view(layout.batch, layout.heads, -1)
    visited = visible.sum(-1, dtype=torch.int64)
    if layout.heads not in (1, heads):
        visited = visited.repeat_interleave(heads // layout.heads, 1)
    return BlasstStats(kept.sum((-1, -2), dtype=torch.int64), visited.expand(batch, heads).contiguous())


BLASST = Method("blasst", BlasstConfig, select, blasst_attention, causal=True, by_shape=True)
