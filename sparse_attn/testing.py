"""The kit that the tests, the benchmarks and other people's engines share: inputs, layouts, the
ground truth and the tolerance rule.

An engine is right when `check_engine` passes on it for many cases. The rule (CONVENTIONS, "Tests";
the same as FlashAttention's) asks that the largest error against a float64 reference is at most

    2 * (largest error of plain PyTorch in the same dtype) + 2 * max|ref + 0.3 - 0.3 - ref|

where the second term is the rounding noise of the dtype itself. Positions of NaN and infinities must
agree before any number is compared.

Letters: B batch, Hq/Hkv query and key heads, L queries, S keys, D head size, Dv value head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn.attend import Attended, attend
from sparse_attn.layout import SparseLayout, visible_blocks
from sparse_attn.plan import Plan
from sparse_attn.testing_inputs import (
    LAYOUT_KINDS,
    STRIDES,
    make_inputs,
    random_layout,
    with_strides,
)

__all__ = [
    "LAYOUT_KINDS", "STRIDES", "ErrorReport", "assert_close", "assert_kept", "check_engine", "error_report",
    "kept_mask", "make_inputs", "masked_attention", "plain_gradients", "random_layout", "tile_margins",
    "with_strides",
]  # fmt: skip

# Up to this many elements of the query the largest error of one run is a matter of luck, so that plain
# PyTorch is run in several orders of summation and the worst of them is the yardstick. In float32 the
# order of summation is all that differs; in float16 and bfloat16 rounding swamps it sooner.
FEW_ELEMENTS = {torch.float32: 1 << 15, torch.float16: 1 << 12, torch.bfloat16: 1 << 12}
NUM_ORDERS = 6


# -- the ground truth -----------------------------------------------------------------------------


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Plain differentiable softmax attention over the true entries of a mask, at L x S memory.

    Args:
        query [B, Hq, L, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv]; Hq a multiple of Hkv.
        mask: bool [B|1, 1|Hkv|Hq, L, S], e.g. `layout.to_dense(is_causal)`; None attends everything.
        dtype: every step is computed in it: float64 is the ground truth, the inputs' own dtype is
            the yardstick of the tolerance rule.

    Returns:
        out [B, Hq, L, Dv] in `dtype`, and lse [B, Hq, L], natural log, in `dtype` but at least
        float32. A query that attends nothing gives 0 and -inf.
    """
    group = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.to(dtype) for x in (query, key, value))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * scale
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    if mask.shape[1] not in (1, q.shape[1]):
        mask = mask.repeat_interleave(group, 1)
    scores = scores.masked_fill(~mask, -torch.inf)
    p = scores.softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0)
    lse = scores.to(torch.promote_types(dtype, torch.float32)).logsumexp(-1)
    return p @ v, lse


def plain_gradients(
    inputs: tuple[Tensor, Tensor, Tensor],
    mask: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    *,
    lse: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `masked_attention` by the algebra of every fused backward, PyTorch's included:
    P = exp(S - lse) again from the stored lse, dS = P * (dP - delta), delta = rowsum(dO * O) - dlse. In
    float64 this is what autograd gives; in a lower precision it loses what any such backward loses
    (where one key takes all the weight, dP and delta cancel, which autograd of an eager softmax does
    without rounding).

    Args:
        lse: what a forward stored, [B, Hq, L]: a backward is then judged by what it adds to the
            rounding of the lse that it was given. Default: computed here.

    Returns:
        dq, dk, dv in `dtype`; lse and the sums of delta are in at least float32.
    """
    q, k, v = (x.detach().to(dtype) for x in inputs)
    group, shape = q.shape[1] // k.shape[1], (*k.shape[:2], -1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if mask.shape[1] not in (1, q.shape[1]):
        mask = mask.repeat_interleave(group, 1)
    wide, do = torch.promote_types(dtype, torch.float32), grad_out.to(dtype)
    scores = (q @ k.mT * scale).masked_fill(~mask, -torch.inf).to(wide)
    stored = scores.logsumexp(-1) if lse is None else lse.detach().to(wide)
    p = torch.exp(scores - stored.masked_fill(stored == -torch.inf, 0)[..., None]).to(dtype)
    delta = (do.to(wide) * (p @ v).to(wide)).sum(-1) - grad_lse.to(wide)
    ds = (p.to(wide) * ((do @ v.mT).to(wide) - delta[..., None]) * scale).to(dtype)
    dq, dk, dv = ds @ k, ds.mT @ q, p.mT @ do
    return dq, dk.unflatten(1, shape[1:]).sum(2), dv.unflatten(1, shape[1:]).sum(2)


def orders(
    inputs: tuple[Tensor, Tensor, Tensor], mask: Tensor
) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor, Tensor]]:
    """The same attention with its sums in other orders: head dimensions and keys are shuffled.

    Yields:
        (query, key, value), mask, and the inverse permutations of D [D] and S [S]; first as given, then
        `NUM_ORDERS` - 1 shuffled ones if the query has few elements.
    """
    q, k, v = inputs
    D, S, device = q.shape[3], k.shape[2], q.device
    few = q.numel() <= FEW_ELEMENTS.get(q.dtype, 0)
    generator = torch.Generator().manual_seed(2)
    for number in range(NUM_ORDERS if few else 1):
        dims, keys = (
            (torch.randperm(n, generator=generator) if number else torch.arange(n)).to(device) for n in (D, S)
        )
        shuffled = (q[..., dims], k[:, :, keys][..., dims], v[:, :, keys])
        yield shuffled, mask[..., keys], dims.argsort(), keys.argsort()


# -- the tolerance rule ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ErrorReport:
    """How far a tensor is from its reference.

    Attributes:
        worst: largest absolute error over the finite elements. allowed: what the rule permits.
        where: coordinates of the worst element. got, expected, plain: the values there of the
            tensor, of the reference and of plain PyTorch.
        num_bad, num_elements: elements above `allowed`, and all of them.
        anomalies: sentences about NaN or infinities in the wrong place; empty if there are none.
    """

    worst: float
    allowed: float
    where: tuple[int, ...]
    got: float
    expected: float
    plain: float
    num_bad: int
    num_elements: int
    anomalies: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.anomalies and self.worst <= self.allowed

    def __str__(self) -> str:
        if self.anomalies:
            return "; ".join(self.anomalies)
        return (
            f"worst error {self.worst:.3e} (allowed {self.allowed:.3e}) at {self.where}: got {self.got:.8g}, "
            f"expected {self.expected:.8g}, plain PyTorch {self.plain:.8g}; "
            f"{self.num_bad} of {self.num_elements} elements are out"
        )


def error_report(actual: Tensor, reference: Tensor, plain: Tensor | Sequence[Tensor]) -> ErrorReport:
    """Compare `actual` with a float64 `reference`, measured against what `plain` PyTorch loses.

    Args:
        actual: the tensor under test; its dtype sets the rounding noise.
        reference: the ground truth, ideally float64.
        plain: the same in PyTorch, computed in the dtype under test (or in float32 for an lse). Of
            several runs the worst counts.

    Raises:
        ValueError: the shapes differ.
    """
    plains = [plain] if isinstance(plain, Tensor) else list(plain)
    shapes = [tuple(x.shape) for x in (actual, reference, *plains)]
    if len(set(shapes)) > 1:
        raise ValueError(f"error_report: actual, reference and plain have shapes {shapes}; they must agree.")
    noise_of = reference.detach().to(actual.dtype)
    got, ref, *bases = (x.detach().double() for x in (actual, reference, *plains))
    anomalies = tuple(
        text
        for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf))
        for text in _misplaced(name, test(got), test(ref))
    )
    finite = torch.isfinite(ref) & torch.isfinite(got)
    error = torch.where(finite, (got - ref).abs(), 0)
    base_error = max(
        torch.where(torch.isfinite(ref) & torch.isfinite(base), (base - ref).abs(), 0).max().item()
        for base in bases
    )
    noise = torch.where(finite, (noise_of + 0.3 - 0.3 - noise_of).abs().double(), 0).max().item()
    allowed = 2 * base_error + 2 * noise
    at = int(error.argmax())
    where = tuple(int(x) for x in torch.unravel_index(torch.tensor(at), actual.shape))
    here = [x.flatten()[at].item() for x in (got, ref, bases[0])]
    return ErrorReport(
        worst=error.max().item(), allowed=allowed, where=where, got=here[0], expected=here[1], plain=here[2],
        num_bad=int((error > allowed).sum()), num_elements=got.numel(), anomalies=anomalies,
    )  # fmt: skip


def _misplaced(name: str, got: Tensor, expected: Tensor) -> list[str]:
    wrong = (got != expected).nonzero()
    if not len(wrong):
        return []
    at = tuple(wrong[0].tolist())
    verb = "is unexpected" if got[at] else "is missing"
    return [f"{name} {verb} in {len(wrong)} elements, first at {at}"]


def assert_close(
    actual: Tensor, reference: Tensor, plain: Tensor | Sequence[Tensor], name: str = "result"
) -> None:
    """Raise AssertionError with the worst element and its coordinates if the rule is broken."""
    report = error_report(actual, reference, plain)
    assert report.ok, f"{name}: {report}"


# -- whole engines --------------------------------------------------------------------------------


def tile_margins(
    query: Tensor,
    key: Tensor,
    plan: Plan,
    kept: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Replay the BLASST vote in float64, given which earlier tiles an engine kept.

    Returns:
        margin float64 [B, Hq, Lb, Sb]: the largest of (tile max - running max before - skip_below)
        over the queries of a tile, NaN where the tile is not listed or not visible; a tile is
        right to be kept where this is >= 0. And the rounding slack of a margin in float32: a float.
    """
    layout = plan.layout
    assert plan.skip_below is not None
    group = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.double() @ key.double().repeat_interleave(group, 1).mT * scale
    slack = 2.0**-18 * (1 + scores.abs().max())
    mask = SparseLayout(
        layout.blocks, layout.block_m, layout.block_n, layout.L, layout.S, layout.batch, layout.heads
    ).to_dense(is_causal)
    if mask.shape[1] not in (1, query.shape[1]):
        mask = mask.repeat_interleave(group, 1)
    scores = scores.masked_fill(~mask, -torch.inf)
    margin = torch.full(kept.shape, torch.nan, dtype=torch.float64, device=kept.device)
    for i in range(layout.num_query_blocks):
        rows = scores[:, :, i * layout.block_m : (i + 1) * layout.block_m]
        running = torch.full(rows.shape[:3], -torch.inf, dtype=torch.float64, device=rows.device)
        for j in range(layout.num_key_blocks):
            tile_max = rows[..., j * layout.block_n : (j + 1) * layout.block_n].amax(-1)
            lead = tile_max - running - plan.skip_below.double()[..., None]
            # A query that sees nothing votes skip; one that saw nothing before has lead +inf.
            lead = lead.masked_fill(tile_max == -torch.inf, -torch.inf)
            visible = (tile_max > -torch.inf).any(-1)
            margin[:, :, i, j] = torch.where(visible, lead.amax(-1), torch.nan)
            keeps = kept[:, :, i, j, None].bool()
            running = torch.where(keeps, running.maximum(tile_max), running)
    return margin, slack


def assert_kept(kept: Tensor, margin: Tensor, slack: Tensor) -> None:
    """Every vote that rounding cannot tip went the right way, and nothing unlisted was kept."""
    listed = ~margin.isnan()
    unlisted = kept.bool() & ~listed
    assert not unlisted.any(), (
        f"kept tiles that are not listed or not visible: {unlisted.nonzero().tolist()[:4]}"
    )
    wrong = listed & (margin.abs() > slack) & (kept.bool() != (margin >= 0))
    first = wrong.nonzero().tolist()[:4]
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {int(listed.sum())} votes are wrong, first at (b, h, i, j) {first}, "
        f"with margins {[margin[tuple(at)].item() for at in first]}"
    )


def kept_mask(layout: SparseLayout, kept: Tensor, is_causal: bool) -> Tensor:
    """bool [B, Hq, L, S]: the pairs attended when only the tiles of `kept` (and the columns) are."""
    L, S = layout.L, layout.S
    tiles = kept.bool().repeat_interleave(layout.block_m, 2).repeat_interleave(layout.block_n, 3)
    mask = tiles[:, :, :L, :S]
    columns = layout.column_mask()
    if columns is not None:
        assert layout.columns is not None
        columns = columns.repeat_interleave(layout.columns.group * layout.block_m, 2)[:, :, :L]
        if columns.shape[1] not in (1, kept.shape[1]):
            columns = columns.repeat_interleave(kept.shape[1] // columns.shape[1], 1)
        mask = mask | columns
    if is_causal:
        queries = torch.arange(L, device=mask.device)[:, None]
        mask = mask & (torch.arange(S, device=mask.device) <= queries + S - L)
    return mask


def check_engine(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    *,
    engine: str,
    is_causal: bool = False,
    scale: float | None = None,
    grad: bool = False,
) -> Attended:
    """Run one call on one engine and hold it against float64 masked attention.

    Checks out, lse and kept; with `grad` also dq, dk and dv, for random gradients of both out and
    lse. With a skip, the votes are replayed and the truth is attention over the tiles it kept.

    Raises:
        AssertionError: something differs; the text says what, where and by how much.
    """
    q, k, v = (x.detach().requires_grad_(grad) for x in (query, key, value))
    enable_gqa = query.shape[1] != key.shape[1]
    got = attend(
        q, k, v, plan, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, engine=engine, want_kept=True
    )
    assert got.kept is not None
    if plan.skip_below is not None:
        replay = tile_margins(query, key, plan, got.kept, is_causal=is_causal, scale=scale)
        assert_kept(got.kept, *replay)
    else:
        listed = _listed_tiles(plan.layout, got.kept.shape, is_causal)
        assert torch.equal(got.kept.bool(), listed), "kept differs from the listed, visible tiles"
    mask = kept_mask(plan.layout, got.kept, is_causal)
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    assert (got.out.dtype, got.lse.dtype) == (query.dtype, lse_dtype), (got.out.dtype, got.lse.dtype)
    with torch.no_grad():
        _check_outputs((query, key, value), got, mask, scale)
    if grad:
        _check_gradients((q, k, v), got, mask, scale)
    return got


def _check_outputs(inputs: tuple[Tensor, Tensor, Tensor], got: Attended, mask: Tensor, scale) -> None:
    out, lse = masked_attention(*inputs, mask, scale=scale)
    plain_out, plain_lse = [], []
    for shuffled, its_mask, _, _ in orders(inputs, mask):
        plain_out.append(masked_attention(*shuffled, its_mask, scale=scale, dtype=got.out.dtype)[0])
        plain_lse.append(masked_attention(*shuffled, its_mask, scale=scale, dtype=torch.float32)[1])
    assert_close(got.out, out, plain_out, "out")
    assert_close(got.lse, lse, plain_lse, "lse")


def _check_gradients(inputs: tuple[Tensor, Tensor, Tensor], got: Attended, mask: Tensor, scale) -> None:
    generator = torch.Generator().manual_seed(1)
    grad_out, grad_lse = (torch.randn(x.shape, generator=generator).to(x) for x in (got.out, got.lse))
    # A row that attends nothing has lse -inf; its gradient is no number in any framework.
    grad_lse = grad_lse.masked_fill(got.lse == -torch.inf, 0)
    found = torch.autograd.grad((got.out, got.lse), inputs, (grad_out, grad_lse))
    exact = plain_gradients(inputs, mask, grad_out, grad_lse, scale=scale)
    plain: list[list[Tensor]] = [[], [], []]
    for shuffled, shuffled_mask, dims, keys in orders(inputs, mask):
        dq, dk, dv = plain_gradients(
            shuffled, shuffled_mask, grad_out, grad_lse, lse=got.lse, scale=scale, dtype=inputs[0].dtype
        )
        for runs, x in zip(plain, (dq[..., dims], dk[:, :, keys][..., dims], dv[:, :, keys]), strict=True):
            runs.append(x)
    for name, x, ref, base in zip(("dq", "dk", "dv"), found, exact, plain, strict=True):
        assert x.dtype == inputs[0].dtype, f"{name} has dtype {x.dtype}"
        assert_close(x, ref, base, name)


def _listed_tiles(layout: SparseLayout, shape: torch.Size, is_causal: bool) -> Tensor:
    """bool [B, Hq, Lb, Sb]: listed tiles with at least one visible pair."""
    tiles = layout.block_mask()
    if is_causal:
        tiles = tiles & visible_blocks(layout.L, layout.S, layout.block_m, layout.block_n, tiles.device)
    if tiles.shape[1] not in (1, shape[1]):
        tiles = tiles.repeat_interleave(shape[1] // tiles.shape[1], 1)
    return tiles.expand(shape)
