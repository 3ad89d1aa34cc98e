"""Attention over pages, several sequences in one engine call.

Sequences that decode go together whatever their lengths; prompts whose causal edges can be brought into one
line do too (`varlen_join`); what is left has a call of its own. Either way a sequence's selection is its own,
and it reads what it reads alone. Where only the reference engine can run a call, each sequence has one.

Letters as in `varlen`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import lcm
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_attn.attend import Attended, attend
from sparse_attn.checks import autocast
from sparse_attn.engines import AttendCall, choose
from sparse_attn.engines.cpu import CpuEngine
from sparse_attn.methods.blasst import full_layout
from sparse_attn.plan import Plan
from sparse_attn.varlen_join import (
    Joined,
    Member,
    Pages,
    join_padded,
    join_tokens,
    place_few,
    place_prompts,
    prompt_pages,
    remembered_padded,
)
from sparse_attn.varlen_pages import gather_pages, gather_pages_by_head, needed_pages

if TYPE_CHECKING:
    from sparse_attn.varlen import Each

FEW = 16  # queries up to which a sequence counts as decoding
DENSE_BLOCK = 128
UNIT = 128  # keys by which prompts are placed: the key blocks of those that go together divide it
MIN_ROWS = 16  # of a query block: what Triton takes, and a panel of the CPU engine
# Gathered keys and values of one call; a longer sequence has its own. On a CPU more at once is slower:
# memory of that size comes fresh from the system at every call, page by page.
MAX_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
# Keys of a batch, padding included, to those of its sequences: padding is copied, but not attended.
MAX_PADDING = {"prompts": 1.5, "votes": 4.0}
_HOST = torch.device("cpu")


def launches_cost(device: torch.device) -> bool:
    """Whether sequences gain by sharing a call even where that adds rows (prompts, and decoding where BLASST
    votes). On a CPU a call costs less than the rows that a batch rounds up to."""
    return device.type != "cpu"


def token_rows(query: Tensor) -> int:
    """Rows of a decoded token's query block, at least: what an engine computes at once anyway."""
    if query.device.type == "cpu" and query.element_size() == 2 and CpuEngine().instruction_set() == "amx":
        return 64  # from here on the CPU engine packs 16-bit keys for AMX tiles
    return MIN_ROWS


@dataclass(frozen=True, eq=False)
class PagedCall:
    """Checked arguments of a call.

    Attributes:
        query: [T, Hq, D]; caches: keys and values, [num_pages, page_size, heads, D or Dv].
        table: [N, max_pages]; q_lens, k_lens: of each sequence.
        kv_heads: those of the caches that the queries go with, in order; None: all.
        out: [T, Hq, Dv], where the result is to be written; None: a new tensor.
    """

    query: Tensor
    caches: tuple[Tensor, Tensor]
    table: Tensor
    q_lens: Sequence[int]
    k_lens: Sequence[int]
    kv_heads: Sequence[int] | None = None
    out: Tensor | None = None

    @property
    def num_kv_heads(self) -> int:
        return self.caches[0].shape[2] if self.kv_heads is None else len(self.kv_heads)

    @property
    def pages(self) -> Pages:
        return Pages(self.caches[0].shape[1], self.table.shape[1], self.num_kv_heads, self.query.device)

    @property
    def max_keys(self) -> int:
        """How many tokens' keys and values may be gathered at once."""
        dims = sum(x.shape[3] for x in self.caches)
        bytes_each = self.num_kv_heads * dims * self.caches[0].element_size()
        return MAX_BYTES.get(self.query.device.type, MAX_BYTES["cuda"]) // bytes_each


def attend_paged(each: Each, call: PagedCall) -> tuple[Tensor, Tensor]:
    """out [T, Hq, Dv] and lse float32 [Hq, T]."""
    query, heads = call.query, call.query.shape[1]
    out = call.out
    if out is None:
        out = query.new_empty(len(query), heads, call.caches[1].shape[3])
    if not all(call.k_lens):
        out.zero_()
    lse = query.new_full((heads, len(query)), -torch.inf, dtype=torch.float32)
    starts = [0, *accumulate(call.q_lens)]
    sizes = zip(starts[:-1], call.q_lens, call.k_lens, strict=True)
    members = [Member(n, a, L, S) for n, (a, L, S) in enumerate(sizes) if L and S]
    run = _Run(each, call, out, lse)
    only_reference = each.engine == "reference" or query.dtype == torch.float64
    if each.can_join and not only_reference and not torch.compiler.is_compiling():
        run.together(members)
    for x in members:
        if x.number not in run.done:
            run.alone(x)
    return out, lse


_Some = list[tuple[Member, Plan | None]]  # sequences, each with its plan where its shape decides that


@dataclass(eq=False)
class _Run:
    """One call under way. `done` are the sequences whose results are in `out` and `lse`."""

    each: Each
    call: PagedCall
    out: Tensor
    lse: Tensor
    done: set[int] = field(default_factory=set)

    # -- one sequence -----------------------------------------------------------------------------

    def alone(self, x: Member) -> None:
        call = self.call
        num_pages = -(-x.S // call.pages.size)
        needed = None
        if (
            x.L < x.S
        ):  # a prompt with no cached prefix reads every key, at least from the block that it lies in
            plan = self.plan_by_shape(x, call.query.device)
            if plan is not None:
                found = needed_pages(plan.layout, call.num_kv_heads, call.pages.size)
                needed = None if found.all() else found.nonzero(as_tuple=True)
        pages = call.table[x.number, None, :num_pages].long()
        k, v = gather_pages(call.caches, pages, needed, call.kv_heads)  # type: ignore[arg-type]
        self.put_alone(x, k[:, :, : x.S], v[:, :, : x.S])

    def put_alone(self, x: Member, k: Tensor, v: Tensor) -> None:
        """k [1, Hkv, S, D], v [1, Hkv, S, Dv]"""
        result = self.each.attend(x.number, self.queries(x), k, v)
        here = slice(x.start, x.start + x.L)
        self.out[here], self.lse[:, here] = result.out[0].transpose(0, 1), result.lse[0]
        self.done.add(x.number)

    def queries(self, x: Member) -> Tensor:
        """[1, Hq, L, D]"""
        return self.call.query[x.start : x.start + x.L].transpose(0, 1)[None]

    def plan_by_shape(self, x: Member, device: torch.device) -> Plan | None:
        """The plan of a sequence where its shape decides it, for tensors on `device`; else None."""
        heads, dim = self.call.query.shape[1:]
        shape = (heads, self.call.num_kv_heads, x.L, x.S, dim, self.call.query.dtype, device)
        try:
            return self.each.plan_by_shape(shape, remember=x.L <= FEW)
        except (ValueError, NotImplementedError):
            return None  # what `alone` does will say it of this sequence

    def plan(self, x: Member, k: Tensor) -> Plan:
        """The plan of a sequence over its keys [1, Hkv, S, D]."""
        try:
            return self.each.plan(x.number, self.queries(x), k)
        except (ValueError, NotImplementedError) as error:
            raise self.each.named(error, x.number, x.L, x.S) from error

    # -- which sequences go together --------------------------------------------------------------

    def together(self, members: list[Member]) -> None:
        """Attend as many as possible in as few calls as possible."""
        unit = lcm(self.call.pages.size, UNIT)
        groups: dict[tuple[Any, ...], _Some] = defaultdict(list)
        for x in members:
            how, placed, plan = self.group_of(x, unit)
            if how is not None:
                groups[how].append((placed, plan))
        for (kind, *_), group in groups.items():
            if kind == "tokens":
                self.by_tokens(group)
                continue
            for part in _batches(self.call, group, unit, kind):
                if kind == "votes":
                    self.by_votes(part, unit)
                else:
                    self.by_prompts(part, unit)

    def group_of(self, x: Member, unit: int) -> tuple[tuple[Any, ...] | None, Member, Plan | None]:
        """What is equal for sequences that may go together; the sequence; its plan where shape decides it."""
        each, device = self.each, self.call.query.device
        is_few = x.L <= FEW and x.L <= x.S
        may_add_rows = launches_cost(device)
        is_prompt = each.is_causal and x.L <= x.S and may_add_rows
        if each.is_dense(x.L, x.S):
            if is_few:
                return ("tokens", DENSE_BLOCK, 1), x, None
            if not is_prompt:
                return None, x, None
            # All rows read all that they see, so that nothing depends on the row at which a query lies.
            x = replace(x, lead=(x.S - x.L) % unit)
            every = Plan(full_layout(x.L + x.lead, x.S, DENSE_BLOCK, DENSE_BLOCK, _HOST))
            return ("prompts", 0, _shape_of(every)), x, every
        if not (is_few or is_prompt):
            return None, x, None
        # Made on the host, where lists are joined without waiting for a GPU; thresholds may lie elsewhere.
        plan = self.plan_by_shape(x, _HOST)
        if plan is None and device != _HOST:
            plan = self.plan_by_shape(x, device)
        if plan is not None and not self.fits(plan, x):
            return None, x, None
        if plan is not None and is_few and plan.layout.num_query_blocks == 1 and plan.layout.columns is None:
            layout = plan.layout
            if plan.skip_below is None:
                return ("tokens", layout.block_n, layout.heads), x, plan
            rows, first = self.vote_rows(plan), (x.S - x.L) % unit
            is_one_block = first // rows == (first + x.L - 1) // rows and not unit % layout.block_n
            if is_one_block and may_add_rows and (each.is_causal or x.L == 1):
                return ("votes", rows, layout.block_n, layout.heads), x, plan
        if not is_prompt or (plan is not None and unit % plan.layout.block_n):
            return None, x, None
        return ("prompts", (x.S - x.L) % unit, _shape_of(plan)), x, plan

    def fits(self, plan: Plan, x: Member) -> bool:
        """Whether a layout is for this sequence; `attend` says of others what is wrong with them."""
        layout = plan.layout
        heads = (1, self.call.num_kv_heads, self.call.query.shape[1])
        return (layout.batch, layout.L, layout.S) == (1, x.L, x.S) and layout.heads in heads

    def vote_rows(self, plan: Plan) -> int:
        """Rows of a block in which a few queries vote. Their number does not matter, since all repeat those
        queries; the CPU engine computes each."""
        return MIN_ROWS if self.call.query.device.type == "cpu" else plan.layout.block_m

    # -- one call ---------------------------------------------------------------------------------

    def by_tokens(self, group: _Some) -> None:
        plan = group[0][1]
        block_n, heads = (DENSE_BLOCK, 1) if plan is None else (plan.layout.block_n, plan.layout.heads)
        unit = lcm(self.call.pages.size, block_n)
        num_heads, num_kv_heads = self.call.query.shape[1], self.call.num_kv_heads
        fold = num_heads // num_kv_heads if heads in (1, num_kv_heads) else 1
        block_m = max(token_rows(self.call.query), 1 << (fold - 1).bit_length())
        for part in _portions(self.call, group, unit):
            joined = join_tokens(
                tuple(None if own is None else own.layout for _, own in part),
                tuple(x for x, _ in part),
                self.call.pages,
                is_causal=self.each.is_causal, block_m=block_m, block_n=block_n, unit=unit,
            )  # fmt: skip
            k, v = self.gather(joined)
            q = self.call.query.index_select(0, joined.queries).unflatten(1, (-1, fold))
            rows = q.new_zeros(q.shape[1], len(q), block_m, q.shape[3])
            rows[:, :, :fold] = q.transpose(0, 1)
            result = self.attend(rows.flatten(1, 2)[None], k, v, Plan(joined.layout), is_causal=False)
            if result is None:
                continue
            out, lse = (
                y[0].unflatten(1, (-1, block_m))[:, :, :fold].transpose(0, 1).flatten(1, 2)
                for y in (result.out, result.lse[..., None])
            )
            self.put(part, joined, out, lse[..., 0].T)

    def by_votes(self, part: _Some, unit: int) -> None:
        if len(part) == 1:
            return
        members = tuple(x for x, _ in part)
        plans = [plan for _, plan in part if plan is not None]
        joined = remembered_padded(
            tuple(plan.layout for plan in plans), members, self.call.pages, place_few(members, unit),
            block_m=self.vote_rows(plans[0]),
        )  # fmt: skip
        self.padded(part, joined, plans, *self.gather(joined))

    def by_prompts(self, part: _Some, unit: int) -> None:
        if len(part) == 1:
            return
        members = tuple(x for x, _ in part)
        place, pages = place_prompts(members, unit), self.call.pages
        plans = [plan for _, plan in part if plan is not None]
        if plans:
            joined = remembered_padded(
                tuple(plan.layout for plan in plans), members, pages, place, block_m=plans[0].layout.block_m
            )
            return self.padded(part, joined, plans, *self.gather(joined))
        index = prompt_pages(members, pages, place).to(pages.device)
        k, v = gather_pages(self.call.caches, self.pages_at(index), None, self.call.kv_heads)
        own = [
            (k[n, None, :, first : first + x.S], v[n, None, :, first : first + x.S])
            for n, (x, first) in enumerate(zip(members, place.first_key, strict=True))
        ]
        plans = [self.plan(x, key) for x, (key, _) in zip(members, own, strict=True)]
        shapes = {_shape_of(plan) for plan in plans}
        fit = all(self.fits(plan, x) for plan, x in zip(plans, members, strict=True))
        if len(shapes) > 1 or not fit or unit % plans[0].layout.block_n:
            for x, (key, value) in zip(members, own, strict=True):
                self.put_alone(x, key, value)
            return None
        joined = join_padded(
            tuple(plan.layout for plan in plans), members, pages, place, block_m=plans[0].layout.block_m,
            keys_are_read=True,
        )  # fmt: skip
        return self.padded(part, joined, plans, k, v)

    def padded(self, part: _Some, joined: Joined, plans: Sequence[Plan], k: Tensor, v: Tensor) -> None:
        """k [B, Hkv, keys, D] and v [B, Hkv, keys, Dv], a sequence each."""
        if joined.tails is not None:
            entry, after, last = joined.tails
            for x in (k, v):
                x[entry, :, after] = x[entry, :, last]
        skips = [plan.skip_below for plan in plans if plan.skip_below is not None]
        skip_below = torch.cat(skips).to(k.device, non_blocking=True) if skips else None
        q = self.call.query.index_select(0, joined.queries).unflatten(0, (len(plans), -1)).transpose(1, 2)
        result = self.attend(q, k, v, Plan(joined.layout, skip_below), is_causal=True)
        if result is not None:
            out = result.out.transpose(1, 2).flatten(0, 1).index_select(0, joined.results)
            lse = result.lse.transpose(0, 1).flatten(1, 2).index_select(1, joined.results)
            self.put(part, joined, out, lse)

    def gather(self, joined: Joined) -> tuple[Tensor, Tensor]:
        pages = self.pages_at(joined.pages)
        if joined.by_head:
            return gather_pages_by_head(self.call.caches, pages, self.call.kv_heads)
        return gather_pages(self.call.caches, pages, joined.needed, self.call.kv_heads)

    def pages_at(self, index: Tensor) -> Tensor:
        """Pages that `index` names in the flattened block table."""
        return self.call.table.flatten()[index].long()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, is_causal: bool) -> Attended | None:
        """None: no engine runs it but the reference, which reads what no list names."""
        q, k, v = autocast(q, k, v)
        scale = q.shape[-1] ** -0.5 if self.each.scale is None else float(self.each.scale)
        call = AttendCall(q, k, v, plan.layout, plan.skip_below, is_causal, scale)
        try:
            if choose(call, self.each.engine).name == "reference":
                return None
        except NotImplementedError:
            return None
        return attend(
            q, k, v, plan, is_causal=is_causal, scale=scale, enable_gqa=True, engine=self.each.engine,
            op=self.each.op,
        )  # fmt: skip

    def put(self, part: _Some, joined: Joined, out: Tensor, lse: Tensor) -> None:
        """out [tokens, Hq, Dv] and lse [Hq, tokens] of `joined.tokens`"""
        self.out.index_copy_(0, joined.tokens, out)
        self.lse.index_copy_(1, joined.tokens, lse)
        self.done.update(x.number for x, _ in part)


def _shape_of(plan: Plan | None) -> tuple[Any, ...] | None:
    """What layouts that are joined have in common."""
    if plan is None:
        return None
    layout = plan.layout
    group = 0 if layout.columns is None else layout.columns.group
    return layout.block_m, layout.block_n, layout.heads, group, plan.skip_below is not None


def _portions(call: PagedCall, group: _Some, unit: int) -> list[_Some]:
    """Sequences in their order, as many a call as may be gathered at once."""
    portions: list[_Some] = []
    keys = 0
    for x, plan in group:
        room = -(-x.S // unit) * unit
        if not portions or keys + room > call.max_keys:
            portions.append([])
            keys = 0
        portions[-1].append((x, plan))
        keys += room
    return portions


def _batches(call: PagedCall, group: _Some, unit: int, kind: str) -> list[_Some]:
    """Sequences of like lengths, as many a call as may be gathered at once with little padding."""
    batches: list[_Some] = []
    most, real = (0, 0), 0
    for x, plan in sorted(group, key=lambda own: -own[0].S):
        own = (x.S, 0) if kind == "votes" else (x.before, x.L + x.lead)
        joint = (max(most[0], own[0]), max(most[1], own[1]))
        keys = -(-sum(joint) // unit) * unit * (len(batches[-1]) + 1 if batches else 1)
        room = -(-x.S // unit) * unit
        if not batches or keys > MAX_PADDING[kind] * (real + room) or keys > call.max_keys:
            batches.append([])
            joint, real = own, 0
        batches[-1].append((x, plan))
        most, real = joint, real + room
    return batches
