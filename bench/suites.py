"""The suites: which cases each one measures, and the bars that its rows must meet."""

from __future__ import annotations

from sparse_attn.bench.cases import Bar, ByMethod, Case, Full, Random, Skewed, Strided, from_shape
from sparse_attn.bench.hopper_suite import HOPPER_BARS, HOPPER_CASES

_PEER_SPEED = "median over paired rounds of (FlexAttention time / ours), same BlockMask, same process"
_SDPA_SPEED = "median over paired rounds of (torch SDPA time / ours)"
_EFFICIENCY = "median over paired rounds of (best dense time x density / ours)"
_TFLOPS = "4 H D x attended pairs / median time"
_TFLOPS_BWD = "2.5 x 4 H D x attended pairs / median time"

# -- cpu: 2 cores, a few minutes ------------------------------------------------------------------


def _cpu_cases() -> list[Case]:
    cases = []
    for head_dim in (64, 128):
        for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
            for pattern, tag in (
                (Full(64, 64), "full"),
                (Random(0.25, 64, 64), "d0.25"),
                (Random(0.1, 64, 64), "d0.1"),
            ):
                name = f"s4096-h8-d{head_dim}-{short}-{tag}"
                cases.append(Case(name, 8, 8, 4096, head_dim, pattern, dtype, rounds=7))
    return cases


def _cpu_bars() -> list[Bar]:
    bars = []
    for case in _cpu_cases():
        if isinstance(case.pattern, Full):
            bars.append(
                Bar(f"{case.name}: speed of SDPA", case.name, "speed_vs.sdpa", _SDPA_SPEED, at_least=0.9)
            )
        elif isinstance(case.pattern, Random):
            least = 0.85 if case.pattern.density == 0.25 else 0.75
            what = f"{case.name}: sparse efficiency"
            bars.append(Bar(what, case.name, "sparse_efficiency", _EFFICIENCY, at_least=least))
    return bars


# -- triton: one H100, under 5 minutes with compilation -------------------------------------------

_S2 = Strided(block=64, local_blocks=8, stride=16)
_ANCHOR = ByMethod("anchor", {"theta": 10.0})

_BASELINES = ("sdpa-cudnn", "sdpa-flash", "fa3", "fa4")

TRITON_CASES = [
    Case("block-sparse-d0.25", 24, 24, 32768, 128, Random(0.25), why="HunyuanVideo's heads"),
    Case("block-sparse-d0.1", 24, 24, 32768, 128, Random(0.1), why="HunyuanVideo's heads"),
    Case("s2-s32768", 32, 32, 32768, 128, _S2, is_causal=True, backward=True, peers=_BASELINES, rounds=11),
    Case("anchor-s32768", 32, 32, 32768, 128, _ANCHOR, is_causal=True, data="causal", gate_length=6200,
         peers=_BASELINES, rounds=9),
    *(
        Case(f"blasst-{scale:g}", 32, 32, 32768, 128, ByMethod("blasst", {"threshold": scale / 32768}),
             is_causal=True, data="causal", peers=_BASELINES, rounds=9)
        for scale in (0.0, 300.0, 3000.0, 12000.0)
    ),
    from_shape("dense-llama", "llama-3.1-8b", Full(), length=16384, peers=_BASELINES),
    Case("dense-d64", 32, 32, 16384, 64, Full(), is_causal=True, peers=_BASELINES, why="head size 64"),
    Case("s2-s131072", 32, 32, 131072, 128, Strided(64, 8, 32), is_causal=True, backward=True,
         peers=("sdpa-cudnn",), rounds=3),
    Case("anchor-s131072", 32, 32, 131072, 128, _ANCHOR, is_causal=True, data="causal", gate_length=6200,
         peers=("sdpa-cudnn",), rounds=3),
    Case("skewed-s65536", 32, 8, 65536, 128, Skewed(128, 8, 0.1), is_causal=True, rounds=5,
         peers=("sdpa-cudnn", "flex")),
]  # fmt: skip

# The public AnchorAttention kernel took 9.1 ms on an H100, beside 14.3 ms of cuDNN dense attention.
TRITON_BARS = [
    Bar("block lists 128x128, density 0.25, vs FlexAttention", "block-sparse-d0.25", "speed_vs.flex",
        _PEER_SPEED, at_least=1.05),
    Bar("block lists 128x128, density 0.1, vs FlexAttention", "block-sparse-d0.1", "speed_vs.flex",
        _PEER_SPEED, at_least=1.05),
    Bar("S2 S32768 L8 V16, forward", "s2-s32768", "tflops", _TFLOPS, at_least=430, unit="TFLOPS"),
    Bar("S2 S32768 L8 V16, backward", "s2-s32768", "tflops", _TFLOPS_BWD, step="bwd", at_least=300,
        unit="TFLOPS"),
    Bar("AnchorAttention S32768 theta 10, with selection", "anchor-s32768", "ms.median",
        "median time of the whole call; 0.7 x 9.1 ms of the public kernel", step="total", at_most=6.37,
        unit="ms"),
]  # fmt: skip

# -- methods: selection and attention apart, with what they lose ----------------------------------


def method_cases(length: int, heads: int, on_gpu: bool) -> list[Case]:
    """Each method on data of its own kind.

    Args:
        length: tokens, near enough for a video grid. heads: query heads (half as many key heads for
            the causal methods where that is whole).
        on_gpu: bfloat16 and 15 rounds instead of float32 and 5.
    """
    common = {"dtype": "bfloat16" if on_gpu else "float32", "rounds": 15 if on_gpu else 5}
    kv = max(heads // 2, 1)
    causal = {"is_causal": True, "data": "causal", **common}
    # A superblock of the default 16 x 128 queries would be most of a short sequence.
    anchor = {"theta": 10.0} if length >= 16384 else {"theta": 10.0, "block_size": 64, "step": 8}
    # As many shards as heads at most, so that together they still cover every key.
    s2 = {"local_blocks": 8, "vert_stride": min(8, heads), "per_query_head": True}
    video = from_shape("", "wan2.1-1.3b-480p", Full()).resized(length)
    return [
        Case("blasst", heads, kv, length, 128, ByMethod("blasst", {"threshold": 0.03}), **causal),
        Case("anchor", heads, kv, length, 128, ByMethod("anchor", anchor), gate_length=1700, **causal),
        Case("s2", heads, kv, length, 128, ByMethod("s2", s2), **causal),
        Case("sparsed", heads, heads, length, 128, ByMethod("sparsed"), data="bidirectional", **common),
        Case(
            "vdit", heads, heads, video.length, 128, ByMethod("vdit"), data="video", grid=video.grid, **common
        ),
    ]


# -- smoke: seconds, on anything ------------------------------------------------------------------

SMOKE_CASES = [
    Case("smoke-full", 2, 1, 300, 32, Full(64, 64), "float32", is_causal=True, rounds=3, gate_length=300),
    Case("smoke-d0.25", 2, 1, 300, 32, Random(0.25, 64, 64), "float32", rounds=3, gate_length=300),
]

CASES = {"cpu": _cpu_cases(), "triton": TRITON_CASES, "hopper": HOPPER_CASES, "smoke": SMOKE_CASES}
BARS: dict[str, list[Bar]] = {
    "cpu": _cpu_bars(), "triton": TRITON_BARS, "hopper": HOPPER_BARS, "methods": [], "smoke": [],
}  # fmt: skip
