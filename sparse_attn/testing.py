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

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from sparse_attn.attend import Attended, attend
from sparse_attn.layout import SparseLayout, visible_blocks
from sparse_attn.plan import Plan

STRIDES = ("contiguous", "blhd", "sliced", "packed")
LAYOUT_KINDS = (
    "full", "window", "strided", "random", "empty_rows", "full_rows", "one_column", "columns", "only_columns",
)  # fmt: skip


# -- inputs ---------------------------------------------------------------------------------------


def make_inputs(
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    L: int = 127,
    S: int | None = None,
    head_dim: int = 64,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    strides: str = "contiguous",
    requires_grad: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded normal query [B, Hq, L, D], key [B, Hkv, S, D] and value [B, Hkv, S, Dv].

    Args:
        kv_heads: default `heads`. S: default L. value_dim: default `head_dim`.
        strides: how the tensors lie in memory. "contiguous"; "blhd": (B, L, H, D) seen through
            `transpose(1, 2)`; "sliced": a window of a larger NaN-filled tensor, so that a read out of
            bounds shows; "packed": as "blhd" with padding between heads, as in a fused projection.
        requires_grad: make all three leaves that require gradients.

    Raises:
        ValueError: unknown `strides`.
    """
    kv_heads, S = kv_heads or heads, S or L
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, L, head_dim), (batch, kv_heads, S, head_dim)]
    shapes.append((batch, kv_heads, S, value_dim or head_dim))
    made = []
    for shape in shapes:
        x = torch.randn(shape, generator=generator).to(device=device, dtype=dtype)
        made.append(with_strides(x, strides).requires_grad_(requires_grad))
    return made[0], made[1], made[2]


def with_strides(x: Tensor, strides: str) -> Tensor:
    """The same numbers, laid out in memory as `make_inputs` names it; the last stride stays 1."""
    B, H, length, dim = x.shape
    if strides == "contiguous":
        return x.contiguous()
    if strides == "blhd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "sliced":
        room = x.new_full((B, H + 1, length + 3, dim + 8), torch.nan)
        room[:, :H, 2 : length + 2, :dim] = x
        return room[:, :H, 2 : length + 2, :dim]
    if strides == "packed":
        room = x.new_full((B, length, H, 2 * dim), torch.nan)
        room[..., :dim] = x.transpose(1, 2)
        return room[..., :dim].transpose(1, 2)
    raise ValueError(f"with_strides: unknown strides {strides!r}; choose one of {', '.join(STRIDES)}.")


def random_layout(
    kind: str,
    L: int,
    S: int,
    *,
    block_m: int = 32,
    block_n: int = 32,
    batch: int = 1,
    heads: int = 1,
    density: float = 0.4,
    column_group: int = 2,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> SparseLayout:
    """A seeded layout of one kind, already checked.

    Args:
        kind: "full", "window" (causal, one block to the left), "strided" (S2), "random" (each block
            with probability `density`), "empty_rows" and "full_rows" (random with about half of the
            rows empty, or full), "one_column" (no blocks, one key a row), "columns" (random blocks
            and, over the rest, random columns shared by `column_group` query blocks),
            "only_columns" (as "columns", without blocks).
        batch, heads: B' and H' of the layout. "full" and "window" repeat one pattern over them.

    Raises:
        ValueError: unknown kind.
    """
    Lb, Sb = ceil(L / block_m), ceil(S / block_n)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(batch, heads, *shape, generator=generator)

    size = {"block_m": block_m, "block_n": block_n, "L": L, "S": S}
    mask, columns = draw(Lb, Sb) < density, None
    some_rows = draw(Lb, 1) < 0.5
    some_rows[..., -1, :] = True  # the last row is always of the named kind, even where Lb == 1
    if kind == "full":
        mask = torch.ones_like(mask)
    elif kind == "window":
        window = SparseLayout.window(L, S, block_m=block_m, block_n=block_n, left=1)
        mask = window.block_mask().expand_as(mask)
    elif kind == "strided":
        position = torch.arange(Lb)[:, None] * block_m // block_n - torch.arange(Sb)
        head = torch.arange(heads)[:, None, None]
        mask = ((position >= 0) & (position < 2)) | ((torch.arange(Sb) + head) % 3 == 0)
        mask = mask.expand(batch, heads, Lb, Sb)
    elif kind == "empty_rows":
        mask = mask & ~some_rows
    elif kind == "full_rows":
        mask = mask | some_rows
    elif kind == "one_column":
        mask = torch.zeros_like(mask)
        key = torch.randint(S, (batch, heads, ceil(Lb / column_group), 1), generator=generator)
        columns = torch.zeros(*key.shape[:3], S, dtype=torch.bool).scatter_(3, key, True)
    elif kind in ("columns", "only_columns"):
        mask = mask if kind == "columns" else torch.zeros_like(mask)
        columns = _free_of_blocks(draw(ceil(Lb / column_group), S) < 0.3, mask, block_n, column_group)
    elif kind != "random":
        raise ValueError(f"random_layout: unknown kind {kind!r}; choose one of {', '.join(LAYOUT_KINDS)}.")
    layout = SparseLayout.from_dense_mask(mask, columns=columns, column_group=column_group, **size)
    return layout.to(device).check()


def _free_of_blocks(columns: Tensor, mask: Tensor, block_n: int, group: int) -> Tensor:
    """Leave out the columns inside a block that any query block of the group reads (invariant 4)."""
    rows, S = columns.shape[2:]
    padded = torch.nn.functional.pad(mask, (0, 0, 0, rows * group - mask.shape[2]))
    read = padded.unflatten(2, (rows, group)).any(3)
    return columns & ~read[..., torch.arange(S) // block_n]


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
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `masked_attention` by the algebra of every fused backward, PyTorch's included:
    dS = P * (dP - delta) with delta = rowsum(dO * O) - dlse. In float64 this is what autograd gives; in
    a lower precision it loses what any such backward loses (where one key takes all the weight, dP
    and delta cancel, which autograd of an eager softmax does without rounding).

    Returns:
        dq, dk, dv in `dtype`; the sums of delta are taken in at least float32.
    """
    q, k, v = (x.detach().to(dtype) for x in inputs)
    group, shape = q.shape[1] // k.shape[1], (*k.shape[:2], -1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if mask.shape[1] not in (1, q.shape[1]):
        mask = mask.repeat_interleave(group, 1)
    p = (q @ k.mT * scale).masked_fill(~mask, -torch.inf).softmax(-1)
    p = p.masked_fill(~mask.any(-1, keepdim=True), 0)
    wide, do = torch.promote_types(dtype, torch.float32), grad_out.to(dtype)
    delta = (do.to(wide) * (p @ v).to(wide)).sum(-1) - grad_lse.to(wide)
    ds = (p.to(wide) * ((do @ v.mT).to(wide) - delta[..., None]) * scale).to(dtype)
    dq, dk, dv = ds @ k, ds.mT @ q, p.mT @ do
    return dq, dk.unflatten(1, shape[1:]).sum(2), dv.unflatten(1, shape[1:]).sum(2)


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


def error_report(actual: Tensor, reference: Tensor, plain: Tensor) -> ErrorReport:
    """Compare `actual` with a float64 `reference`, measured against what `plain` PyTorch loses.

    Args:
        actual: the tensor under test; its dtype sets the rounding noise.
        reference: the ground truth, ideally float64.
        plain: the same in PyTorch, computed in the dtype under test (or in float32 for an lse).

    Raises:
        ValueError: the shapes differ.
    """
    if not actual.shape == reference.shape == plain.shape:
        shapes = f"{tuple(actual.shape)}, {tuple(reference.shape)}, {tuple(plain.shape)}"
        raise ValueError(f"error_report: actual, reference and plain have shapes {shapes}; they must agree.")
    noise_of = reference.detach().to(actual.dtype)
    got, ref, base = (x.detach().double() for x in (actual, reference, plain))
    anomalies = tuple(
        text
        for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf))
        for text in _misplaced(name, test(got), test(ref))
    )
    finite = torch.isfinite(ref) & torch.isfinite(got)
    error = torch.where(finite, (got - ref).abs(), 0)
    finite_base = torch.isfinite(ref) & torch.isfinite(base)
    base_error = torch.where(finite_base, (base - ref).abs(), 0).max().item()
    noise = torch.where(finite, (noise_of + 0.3 - 0.3 - noise_of).abs().double(), 0).max().item()
    allowed = 2 * base_error + 2 * noise
    at = int(error.argmax())
    where = tuple(int(x) for x in torch.unravel_index(torch.tensor(at), actual.shape))
    here = [x.flatten()[at].item() for x in (got, ref, base)]
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


def assert_close(actual: Tensor, reference: Tensor, plain: Tensor, name: str = "result") -> None:
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
    run = {
        dtype: masked_attention(q, k, v, mask, scale=scale, dtype=dtype)
        for dtype in {torch.float64, torch.float32, query.dtype}
    }
    truth, plain = run[torch.float64], run[query.dtype]
    assert_close(got.out, truth[0], plain[0], "out")
    assert_close(got.lse, truth[1], run[torch.float32][1], "lse")
    if grad:
        _check_gradients((q, k, v), got, mask, scale)
    return got


def _check_gradients(inputs: tuple[Tensor, Tensor, Tensor], got: Attended, mask: Tensor, scale) -> None:
    generator = torch.Generator().manual_seed(1)
    grad_out, grad_lse = (torch.randn(x.shape, generator=generator).to(x) for x in (got.out, got.lse))
    # A row that attends nothing has lse -inf; its gradient is no number in any framework.
    grad_lse = grad_lse.masked_fill(got.lse == -torch.inf, 0)
    found = torch.autograd.grad((got.out, got.lse), inputs, (grad_out, grad_lse))
    exact, plain = (
        plain_gradients(inputs, mask, grad_out, grad_lse, scale=scale, dtype=dtype)
        for dtype in (torch.float64, inputs[0].dtype)
    )
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
