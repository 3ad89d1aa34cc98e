"""Who is timed: this package by engine, and its peers, each with the reason when it cannot run."""

from __future__ import annotations

import importlib
import importlib.util
import site
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparse_attn.bench.problem import Problem
from sparse_attn.engines import ENGINES, AttendCall
from sparse_attn.layout import SparseLayout

NO_CUDA = "timed on CUDA only"

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """One way to compute a problem's attention.

    Attributes:
        name: as rows and bars call it; ours are "ours-" and the engine.
        dense: computes every visible pair, whatever the pattern: a baseline for sparse efficiency.
        why_not: reason why a problem cannot run here, or None.
        make: problem -> (q, k, v) -> out, each (B, H, L, D). Conversions of the pattern happen in
            `make`, outside the time.
        has_backward: the result can be differentiated.
    """

    name: str
    dense: bool
    why_not: Callable[[Problem], str | None]
    make: Callable[[Problem], Forward]
    has_backward: bool = True


# -- ours -----------------------------------------------------------------------------------------


def _ours(engine: str) -> Provider:
    def why_not(problem: Problem) -> str | None:
        return "; ".join(ENGINES[engine].why_not(call_of(problem))) or None

    def make(problem: Problem) -> Forward:
        from sparse_attn.attend import attend

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            options = {"is_causal": problem.case.is_causal, "enable_gqa": True, "engine": engine}
            return attend(q, k, v, problem.plan, **options).out

        return forward

    return Provider(f"ours-{engine}", False, why_not, make)


def call_of(problem: Problem) -> AttendCall:
    """The call that `attend` would make."""
    case = problem.case
    return AttendCall(
        problem.q, problem.k, problem.v, problem.plan.layout, problem.plan.skip_below,
        case.is_causal, problem.scale, needs_grad=case.backward,
    )  # fmt: skip


def our_engine(problem: Problem, wanted: str | None = None, *, allow_reference: bool = False) -> str | None:
    """The engine to time: `wanted`, else the first that can run the problem.

    Args:
        allow_reference: the reference engine counts too (it defines the result, and is slow).
    """
    names = [wanted] if wanted else [n for n in ENGINES if n != "reference" or allow_reference]
    return next((name for name in names if not ENGINES[name].why_not(call_of(problem))), None)


def passed_over(problem: Problem, engine: str) -> dict[str, str]:
    """The engines that come before this one and refuse the problem, each with its first reason."""
    before = list(ENGINES)[: list(ENGINES).index(engine)]
    reasons = {name: ENGINES[name].why_not(call_of(problem)) for name in before}
    return {name: why[0] for name, why in reasons.items() if why}


def why_no_engine(problem: Problem) -> str:
    """Every engine's first reason, the reference apart."""
    reasons = {n: e.why_not(call_of(problem)) for n, e in ENGINES.items() if n != "reference"}
    return "; ".join(f"{name}: {why[0]}" for name, why in reasons.items() if why)


# -- torch ----------------------------------------------------------------------------------------


def _sdpa(name: str, backend: str | None) -> Provider:
    def why_not(problem: Problem) -> str | None:
        if backend is not None and problem.q.device.type != "cuda":
            return NO_CUDA
        return None

    def make(problem: Problem) -> Forward:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        case = problem.case
        options = {"is_causal": case.is_causal, "enable_gqa": case.q_heads != case.kv_heads}

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if backend is None:
                return scaled_dot_product_attention(q, k, v, **options)
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return scaled_dot_product_attention(q, k, v, **options)

        return forward

    return Provider(name, True, why_not, make)


_compiled_flex: list[Callable] = []


def _flex_why_not(problem: Problem) -> str | None:
    if problem.q.device.type != "cuda":
        return NO_CUDA  # its CPU kernel has no backward and takes minutes to compile
    return _block_list_only(problem)


def _block_list_only(problem: Problem) -> str | None:
    if problem.plan.skip_below is not None:
        return "has no skip rule"
    return None if problem.plan.layout.columns is None else "has no column lists"


def _flex_make(problem: Problem) -> Forward:
    from torch.nn.attention.flex_attention import flex_attention

    if not _compiled_flex:
        _compiled_flex.append(torch.compile(flex_attention, dynamic=False))
    case, layout = problem.case, problem.plan.layout
    block_mask = layout.to_block_mask(case.is_causal)
    options = None
    if min(layout.block_m, layout.block_n) < 128:  # its default tiles are 128 queries long
        options = {"BLOCK_M": min(layout.block_m, 128), "BLOCK_N": min(layout.block_n, 64)}

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _compiled_flex[0](
            q, k, v, block_mask=block_mask, enable_gqa=case.q_heads != case.kv_heads, kernel_options=options
        )

    return forward


# -- packages of others, (B, L, H, D) -------------------------------------------------------------


def _missing(module: str) -> str | None:
    _read_path_files()
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    return None if found else f"{module} is not installed"


@cache
def _read_path_files() -> None:
    """CUTLASS's Python package is found through a .pth file, which Python reads in site-packages only:
    read it too where the peers were unpacked into a folder of PYTHONPATH."""
    for folder in list(sys.path):
        if (Path(folder) / "nvidia_cutlass_dsl_packages.pth").exists():
            site.addsitedir(folder)


def _flash(name: str, module: str, *, has_backward: bool = True) -> Provider:
    def why_not(problem: Problem) -> str | None:
        if problem.q.device.type != "cuda" or problem.q.dtype == torch.float32:
            return NO_CUDA if problem.q.device.type != "cuda" else "needs 16 bits"
        return _missing(module)

    def make(problem: Problem) -> Forward:
        flash_attn_func = importlib.import_module(module).flash_attn_func

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = flash_attn_func(q, k, v, softmax_scale=problem.scale, causal=problem.case.is_causal)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return forward

    return Provider(name, True, why_not, make, has_backward)


def _paged_why_not(problem: Problem) -> str | None:
    if problem.q.device.type != "cuda":
        return NO_CUDA
    return "needs 16 bits" if problem.q.dtype == torch.float32 else _missing("flash_attn_interface")


def _paged_make(problem: Problem) -> Forward:
    """Dense attention through a page table with pages of one token, in their order in memory: what
    FlashAttention-3 loses when it gathers keys one by one."""
    from flash_attn_interface import flash_attn_with_kvcache

    length, device = problem.case.length, problem.q.device
    pages = torch.arange(length, dtype=torch.int32, device=device)[None]
    lengths = torch.tensor([length], dtype=torch.int32, device=device)
    k, v = (x[0].transpose(0, 1).contiguous()[:, None] for x in (problem.k, problem.v))  # [pages, 1, H, D]

    def forward(q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
        out = flash_attn_with_kvcache(
            q.transpose(1, 2), k, v, cache_seqlens=lengths, page_table=pages,
            softmax_scale=problem.scale, causal=problem.case.is_causal, num_splits=1,
        )  # fmt: skip
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return forward


def _narrow_lists(layout: SparseLayout) -> tuple[Tensor, Tensor]:
    """`to_count_index`, no wider than its longest row."""
    counts, indices = layout.to_count_index()
    return counts, indices[..., : max(int(counts.max()), 1)].contiguous()


def _edge_and_rest(layout: SparseLayout) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Lists of the blocks that the causal diagonal cuts (L == S, square blocks), and of those before it."""
    n = layout.num_query_blocks
    whole = torch.ones(n, n, dtype=torch.bool, device=layout.device)
    size = {"block_m": layout.block_m, "block_n": layout.block_n, "L": layout.L, "S": layout.S}
    mask, before = layout.block_mask(), whole.tril(-1)
    edge = SparseLayout.from_dense_mask(mask & whole.tril() & ~before, **size)
    return _narrow_lists(edge), _narrow_lists(SparseLayout.from_dense_mask(mask & before, **size))


def _fa4_sparse_why_not(problem: Problem) -> str | None:
    layout = problem.plan.layout
    if problem.q.device.type != "cuda":
        return NO_CUDA
    if (layout.block_m, layout.block_n) not in ((128, 128), (64, 64)):
        return "takes blocks of 128x128 or 64x64"
    return _block_list_only(problem) or _missing("flash_attn.cute")


def _fa4_sparse_make(problem: Problem) -> Forward:
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    layout, causal = problem.plan.layout, problem.case.is_causal
    counts, indices = _narrow_lists(layout)
    lists = BlockSparseTensorsTorch(
        torch.zeros_like(counts), torch.zeros_like(indices), counts, indices,
        block_size=(layout.block_m, layout.block_n),
    )  # fmt: skip

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = flash_attn_func(q, k, v, softmax_scale=problem.scale, causal=causal, block_sparse_tensors=lists)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return forward


def _fa4_mask_why_not(problem: Problem) -> str | None:
    layout = problem.plan.layout
    if not problem.case.is_causal or layout.block_m != layout.block_n:
        return "for causal lists of square blocks"
    return _fa4_sparse_why_not(problem)


def _fa4_mask_make(problem: Problem) -> Forward:
    """The causal edge as a mask of the diagonal blocks alone; the others go through the unmasked list,
    where `causal=True` would mask every block."""
    import cutlass.cute as cute
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    @cute.jit
    def causal_edge(batch, head, query, key, lengths, tensors):
        return key <= query

    layout = problem.plan.layout
    edge, rest = _edge_and_rest(layout)
    lists = BlockSparseTensorsTorch(*edge, *rest, block_size=(layout.block_m, layout.block_n))

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = flash_attn_func(
            q, k, v, softmax_scale=problem.scale, mask_mod=causal_edge, block_sparse_tensors=lists
        )
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return forward


def _bsa_why_not(problem: Problem) -> str | None:
    layout = problem.plan.layout
    if problem.q.device.type != "cuda":
        return NO_CUDA
    if problem.case.is_causal:
        return "timed without a causal edge"
    if layout.block_m != layout.block_n or layout.block_m not in (64, 128):
        return "takes blocks of 128x128 or 64x64"
    return _block_list_only(problem) or _missing("cudnn")


def _bsa_make(problem: Problem) -> Forward:
    from cudnn import BSA

    layout = problem.plan.layout
    counts, indices = _narrow_lists(layout)
    counts, indices = (
        x.expand(1, problem.case.q_heads, *x.shape[2:]).contiguous() for x in (counts, indices)
    )
    shortest, longest = int(counts.min()), int(counts.max())
    numbers = None if shortest == longest > 0 else counts  # rows of one length need no counts

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = BSA.block_sparse_attention_forward(
            q, k, v, indices, q2k_block_nums=numbers, sparse_block_size=layout.block_m,
            softmax_scale=problem.scale, allow_empty_block_nums=shortest == 0,
        )  # fmt: skip
        return result["o_tensor"]

    return forward


OURS = [_ours(name) for name in ENGINES]
PROVIDERS: dict[str, Provider] = {
    p.name: p
    for p in [
        *OURS,
        _sdpa("sdpa", None),
        _sdpa("sdpa-cudnn", "CUDNN_ATTENTION"),
        _sdpa("sdpa-flash", "FLASH_ATTENTION"),
        _flash("fa2", "flash_attn.flash_attn_interface"),
        _flash("fa3", "flash_attn_interface", has_backward=False),
        _flash("fa4", "flash_attn.cute"),
        Provider("fa3-page1", True, _paged_why_not, _paged_make, has_backward=False),
        Provider("flex", False, _flex_why_not, _flex_make),
        Provider("fa4-sparse", False, _fa4_sparse_why_not, _fa4_sparse_make, has_backward=False),
        Provider("fa4-sparse-mask", False, _fa4_mask_why_not, _fa4_mask_make, has_backward=False),
        Provider("cudnn-bsa", False, _bsa_why_not, _bsa_make, has_backward=False),
    ]
}
