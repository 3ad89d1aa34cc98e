"""The suite `hopper`: what the Hopper engine must reach beside the fastest peers on one H100."""

from __future__ import annotations

from sparse_attn.bench.cases import (
    Bar,
    ByMethod,
    Case,
    Columns,
    Random,
    Skewed,
    SkipTo,
    Strided,
    from_shape,
)

_RIVALS = "median over paired rounds of (the fastest rival of that round / ours): "
_OWN = "median over paired rounds of (our dense time x density / ours)"
_DENSITIES = (0.5, 0.25, 0.1, 0.05)

# -- dense ----------------------------------------------------------------------------------------

_DENSE = [
    Case("dense-d128-causal-s16384", 32, 8, 16384, 128, is_causal=True, rivals=("fa3",)),
    Case("dense-d128-causal-s65536", 32, 8, 65536, 128, is_causal=True, rivals=("fa3",), rounds=9),
    Case("dense-d128-full-s32768", 24, 24, 32768, 128, rivals=("fa3",)),
    Case("dense-d64-full-s16384", 48, 48, 16384, 64, rivals=("fa3", "fa4")),
    Case("dense-d64-causal-s16384", 32, 32, 16384, 64, is_causal=True, rivals=("fa3", "fa4")),
]

# -- random lists of equal length -----------------------------------------------------------------


def _lists() -> tuple[list[Case], list[Bar]]:
    """Blocks of 128 and of 64 at head size 128 and 64; at 128 x 128 x D128 also the sparse efficiency."""
    cases, bars = [], []
    speed = {
        (128, 128): (1.05, 1.05, 1.10, 1.15), (64, 128): (1.25,) * 4,
        (128, 64): (1.10,) * 4, (64, 64): (1.20,) * 4,
    }  # fmt: skip
    for (block, head_dim), least in speed.items():
        heads, length = (24, 32768) if head_dim == 128 else (48, 16384)
        group = f"lists{block}"
        for density, limit in zip(_DENSITIES, least, strict=True):
            name = f"lists{block}-d{head_dim}-{density:g}"
            cases.append(
                Case(name, heads, heads, length, head_dim, Random(density, block, block), group=group,
                     rivals=("fa4-sparse", "cudnn-bsa"))
            )  # fmt: skip
            bars.append(
                _rivals_bar(f"lists {block}x{block}, D{head_dim}, density {density:g}", cases[-1], limit)
            )
    for density, least in zip(_DENSITIES, (0.97, 0.95, 0.92, 0.88), strict=True):
        what = f"lists 128x128, D128, density {density:g}: sparse efficiency"
        bars.append(Bar(what, f"lists128-d128-{density:g}", "own_efficiency", _OWN, at_least=least))
    return cases, bars


def _rivals_bar(what: str, case: Case, least: float, step: str = "fwd") -> Bar:
    how = _RIVALS + ", ".join(case.rivals)
    return Bar(f"{what}: speed", case.name, "speed_vs_rivals", how, step=step, at_least=least)


# -- the methods' shapes --------------------------------------------------------------------------

_SKEWED = Case("skewed", 32, 8, 65536, 128, Skewed(128, 8, 0.1), is_causal=True, rounds=9,
               rivals=("fa4-sparse", "fa4-sparse-mask"))  # fmt: skip
_COLUMNS = Case("columns", 32, 32, 32768, 128, Columns(0.25, 2048), is_causal=True, rounds=9,
                gate_length=4500, peers=("fa3-page1",))  # fmt: skip
# lambda = 0 as a number, of which the selector makes no skip rule; as a tensor of one for each head, which
# the kernel looks at; and a lambda so small that every tile is voted on and none is skipped.
_BLASST_0 = ByMethod("blasst", {"threshold": 0.0, "block_m": 64})
_BLASST = [
    Case(name, 32, 8, 65536, 128, pattern, is_causal=True, data="causal", peers=("fa3",), rounds=9)
    for name, pattern in (
        ("blasst-0", _BLASST_0), ("blasst-0-per-head", SkipTo(0.0)),
        ("blasst-0-voting", SkipTo(0.0, least_log_lambda=-64.0)),
        ("blasst-0.54", SkipTo(0.54)), ("blasst-0.83", SkipTo(0.83)), ("blasst-0.94", SkipTo(0.94)),
    )
]  # fmt: skip
_ANCHOR = Case("anchor-s131072", 32, 32, 131072, 128, ByMethod("anchor", {"theta": 10.0}), is_causal=True,
               data="causal", gate_length=6200, peers=("sdpa-cudnn",), rounds=5)  # fmt: skip
_S2 = [
    Case(
        "s2-s32768", 32, 32, 32768, 128, Strided(64, 8, 16), is_causal=True, peers=("sdpa-flash",), rounds=11
    ),
    Case(
        "s2-s131072", 32, 32, 131072, 128, Strided(64, 8, 32), is_causal=True, peers=("sdpa-flash",), rounds=5
    ),
]

# Modes by head as a search might find them, mixed so that neighbours differ; density 0.32 at this shape.
_BAND, _TIGHT, _WIDE = "diagonal:1", "multi_diagonal:0.0625", "multi_diagonal:0.1"
_STRIPE, _BOTH = "vertical_stripe:first_frame", "diagonal:2 + vertical_stripe:first_frame"
_VDIT_HEADS = [
    _TIGHT, _BOTH, "full", _BAND, _WIDE, "skip",
    "full", _TIGHT, _BAND, _TIGHT, _STRIPE, "full",
    _BAND, _WIDE, _TIGHT, "full", "skip", _BAND,
    _TIGHT, _BOTH, _WIDE, "full", _BAND, _TIGHT,
]  # fmt: skip
_VDIT = from_shape("vdit-s119056", "hunyuan-video-720p", ByMethod("vdit", {"patterns": _VDIT_HEADS}),
                   peers=("fa3",), rounds=5, gate_length=1500)  # fmt: skip

_LIST_CASES, _LIST_BARS = _lists()
HOPPER_CASES = [*_DENSE, *_LIST_CASES, _SKEWED, _COLUMNS, *_BLASST, _ANCHOR, *_S2, _VDIT]

_FA2 = "median over paired rounds of (FlashAttention-2 dense through torch / ours)"
_FA3 = "median over paired rounds of (FlashAttention-3 dense / ours)"
_CUDNN = "median over paired rounds of (cuDNN dense through torch / the whole call with selection)"

HOPPER_BARS = [
    *(_rivals_bar(case.name, case, 1.0) for case in _DENSE),
    *_LIST_BARS,
    _rivals_bar("skewed causal rows", _SKEWED, 1.05),
    Bar("columns: of our own dense TFLOPS", "columns", "own_efficiency", _OWN, at_least=0.85),
    Bar("columns: TFLOPS beside FA3 with page size 1", "columns", "tflops_vs.fa3-page1",
        "median over paired rounds of (FA3 dense causal, pages of one token, x density / ours)",
        at_least=1.05),
    Bar("BLASST, nothing skipped: of our own dense speed", "blasst-0", "own_efficiency", _OWN, at_least=0.99),
    *(Bar(f"BLASST, {share:.0%} skipped: speed", f"blasst-{share:g}", "speed_vs.fa3", _FA3, at_least=least)
      for share, least in ((0.54, 1.22), (0.83, 1.50), (0.94, 1.65))),
    Bar("AnchorAttention N131072 theta 10", "anchor-s131072", "speed_vs.sdpa-cudnn", _CUDNN, step="total",
        at_least=2.2),
    # On an H100 the public code took 184 ms beside 252 of cuDNN, DKernel 2.14 beside 26.3 of FA2.
    Bar("AnchorAttention, 1.7x the public code", "anchor-s131072", "speed_vs.sdpa-cudnn",
        "1.7 x the public code's 1.37 over the same cuDNN dense, which is timed here; " + _CUDNN,
        step="total", at_least=2.33),
    Bar("S2 S32768 L8 V16, 1.8x DKernel", "s2-s32768", "speed_vs.sdpa-flash",
        "1.8 x DKernel's 12.3 over the same FA2 dense, which is timed here; " + _FA2, at_least=22.1),
    Bar("S2 S131072 L8 V32 vs FA2 dense", "s2-s131072", "speed_vs.sdpa-flash", _FA2, at_least=50),
    Bar("Sparse-vDiT recipe N119056: sparse efficiency", "vdit-s119056", "own_efficiency", _OWN,
        at_least=0.92),
]  # fmt: skip
