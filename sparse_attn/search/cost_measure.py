"""Making a cost table: times of tiles, selections, calls and copies on this device.

    sparse-attn bench --cost-table FILE

Every time is the smallest of several rounds that take the cases in turn: what else runs on a machine only
ever adds. On a CPU it is the processor's time on one thread, which other processes hardly touch; a search
divides it by its number of threads. On a GPU it is the GPU's time between two events, launched while the GPU
is kept busy (`bench.timing`): in a model the host runs ahead.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from sparse_attn.attend import attend
from sparse_attn.layout import SparseLayout
from sparse_attn.methods.base import Context
from sparse_attn.plan import Plan
from sparse_attn.search.candidates import Candidate, Shape, default_candidates
from sparse_attn.search.cost import BY_SHAPE, COLUMNS, CostTable, SelectRow, TileRow, device_name, select_key
from sparse_attn.search.measure import Call, work


@dataclass(frozen=True)
class _Ways:
    """What is measured on a kind of device: calls that fill it, and the tiles of its engines.

    Attributes:
        length, heads, key_heads: of a call.
        dtypes: of queries, keys and values.
        tiles, skip_tiles: (block_m, block_n), without and with a BLASST skip.
        column_rows: queries of a block that reads columns.
    """

    length: int
    heads: int
    key_heads: int
    dtypes: tuple[torch.dtype, ...]
    tiles: tuple[tuple[int, int], ...]
    skip_tiles: tuple[tuple[int, int], ...]
    column_rows: int


WAYS = {
    "cpu": _Ways(
        4096, 8, 4, (torch.float32, torch.bfloat16), ((16, 16), (32, 32), (64, 64), (128, 128)),
        ((32, 64), (64, 64), (128, 128)), 64,
    ),
    # 4096 tiles of 128 queries: enough for the densities below on 132 multiprocessors.
    "cuda": _Ways(
        16384, 32, 8, (torch.bfloat16,), ((64, 64), (64, 128), (128, 64), (128, 128)),
        ((64, 128), (128, 128)), 128,
    ),
}  # fmt: skip
# Keys of a window around the diagonal, as shares of the length; densities run from about 0.02 to 1.
WINDOWS = (1 / 128, 1 / 32, 1 / 8, 1 / 3, 1.0)
QUIET = -1e4  # the logarithm of a lambda that never skips


@dataclass(eq=False)
class _Case:
    run: Callable[[], object]
    best: float = float("inf")  # seconds


def measure_table(
    *,
    device: str = "cpu",
    length: int | None = None,
    head_dims: Iterable[int] = (64, 128),
    dtypes: Iterable[torch.dtype] | None = None,
    rounds: int = 5,
    advance: Callable[[str], None] = lambda text: None,
) -> CostTable:
    """Measure this device.

    Args:
        device: "cpu" or "cuda".
        length: tokens of the calls that are timed; default 4096 on a CPU, 16384 on a GPU.
        dtypes: default float32 and bfloat16 on a CPU, bfloat16 on a GPU.
        rounds: how often each is timed.
        advance: told what has been measured.

    Raises:
        ValueError: no such device, or no GPU.
    """
    if device not in WAYS or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(
            f"cost table: device is {device!r}; use cpu, or cuda where a GPU is visible to torch."
        )
    ways = WAYS[device]
    length = ways.length if length is None else length
    tiles: list[TileRow] = []
    select: list[SelectRow] = []
    call_us = copy_us = 0.0
    with one_thread(device):
        for dtype, dim in product(ways.dtypes if dtypes is None else dtypes, head_dims):
            q, k, v = _inputs(ways, length, dim, dtype, device)
            tiles += _block_rows(q, k, v, ways.tiles, rounds)
            tiles += _skip_rows(q, k, v, ways.skip_tiles, rounds)
            tiles += _column_rows(q, k, v, ways.column_rows, rounds)
            advance(f"tiles, D {dim}, {_name(dtype)}")
            if not call_us:
                call_us, copy_us = _call_us(q, k, v, rounds), _copy_us_per_mib(q, rounds)
                advance("calls and copies")
        for size, dim in product((length // 4, length), head_dims):
            select += _select_rows(ways, size, dim, device, rounds)
            advance(f"selections, {size} tokens, D {dim}")
        threads = torch.get_num_threads()
    from sparse_attn.bench.run import stamp

    made = {k: v for k, v in stamp().items() if k in ("date", "commit", "versions")} | {
        "length": length,
        "device_type": device,
    }
    return CostTable(device_name(device), threads, tuple(tiles), tuple(select), call_us, copy_us, made)


def _inputs(
    ways: _Ways, length: int, dim: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return tuple(  # type: ignore[return-value]
        torch.randn(1, heads, length, dim, generator=generator, device=device).to(dtype)
        for heads in (ways.heads, ways.key_heads, ways.key_heads)
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _best(cases: dict[Any, _Case], rounds: int, device: str) -> None:
    """Time every case once a round, in an order that rotates."""
    if device == "cuda":
        from sparse_attn.bench.timing import measure

        times = measure({str(name): case.run for name, case in cases.items()}, device, rounds=rounds)
        for name, case in cases.items():
            case.best = min(times[str(name)].rounds) / 1e3
        return
    names = list(cases)
    for case in cases.values():
        case.run()
    for n in range(rounds):
        shift = n % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            cases[name].best = min(cases[name].best, _processor_seconds(cases[name].run))


def _processor_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


@contextmanager
def one_thread(device: str) -> Iterator[None]:
    """What runs inside runs on one thread, if it runs on a CPU."""
    threads = torch.get_num_threads()
    if device != "cuda":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Callable[[], object]:
    return lambda: attend(q, k, v, plan, is_causal=True, enable_gqa=True)


def _counts(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> dict[str, float]:
    """Visible tiles and columns of the call, over all query heads."""
    skips = plan.skip_below is not None
    result = attend(q, k, v, plan, is_causal=True, enable_gqa=True, want_kept=skips)
    call = Call(0, q, k, v, True, q.shape[-1] ** -0.5)
    numbers = work(call, plan, result)
    return {name: float(x.mean()) * q.shape[1] for name, x in numbers.items()}


def _block_rows(
    q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[tuple[int, int]], rounds: int
) -> list[TileRow]:
    L, dim = q.shape[2:]
    cases: dict[tuple[int, int, float], _Case] = {}
    plans = {}
    for m, n in tiles:
        for share in WINDOWS:
            left = int(L * share) // n
            if left < 1:
                continue
            layout = SparseLayout.window(
                L, L, block_m=m, block_n=n, left=left, sink_blocks=1, device=q.device
            )
            plan = Plan(replace(layout, neighbours_alike=True))
            plans[m, n, share] = plan
            cases[m, n, share] = _Case(_attend(q, k, v, plan))
    _best(cases, rounds, q.device.type)
    return [
        TileRow(
            "blocks", dim, _name(q.dtype), m, n, _round(plans[m, n, share].layout.density(True)),
            _round(1e6 * case.best / _counts(q, k, v, plans[m, n, share])["visited"]),
        )
        for (m, n, share), case in cases.items()
    ]  # fmt: skip


def _skip_rows(
    q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[tuple[int, int]], rounds: int
) -> list[TileRow]:
    """A tile that is computed and then dropped: every key but the first few far below the maximum."""
    L, dim = q.shape[2:]
    q, k = q.clone(), k.clone()
    q[..., 0], k[..., 0] = 16.0, 0.0
    k[:, :, :4, 0] = 2.0 * dim**0.5  # logits of 32 there, and of a few units elsewhere
    cases: dict[tuple[int, int, float], _Case] = {}
    plans = {}
    for m, n in tiles:
        layout = SparseLayout.full(L, L, block_m=m, block_n=n, device=q.device)
        for log in (QUIET, -8.0):
            threshold = torch.full(q.shape[:2], log, dtype=torch.float32, device=q.device)
            plans[m, n, log] = Plan(layout, threshold)
            cases[m, n, log] = _Case(_attend(q, k, v, plans[m, n, log]))
    _best(cases, rounds, q.device.type)
    rows = []
    for m, n in tiles:
        counts = _counts(q, k, v, plans[m, n, -8.0])
        whole = cases[m, n, QUIET].best / counts["visited"]
        dropped = counts["visited"] - counts["kept"]
        if dropped < counts["visited"] / 2:
            raise RuntimeError(f"cost table: only {dropped} of {counts['visited']} tiles were skipped.")
        us = 1e6 * max(cases[m, n, -8.0].best - counts["kept"] * whole, 0.0) / dropped
        rows.append(TileRow("skipped", dim, _name(q.dtype), m, n, 1.0, _round(us)))
    return rows


def _column_rows(q: Tensor, k: Tensor, v: Tensor, m: int, rounds: int) -> list[TileRow]:
    """Columns beside a window of blocks of m, less the window alone."""
    L, dim = q.shape[2:]
    group, rows = 4, []
    Lb = L // m
    own = torch.arange(Lb, device=q.device)
    blocks = ((own[:, None] >= own) & (own[:, None] // group * group - 1 <= own))[None, None]
    for step in (32, 4):  # every 32nd or 4th earlier key
        key = torch.arange(L, device=q.device)
        first = torch.arange(Lb // group, device=q.device)[:, None] * group * m
        columns = ((key % step == 0) & (key < first - m))[None, None]
        shape: dict[str, Any] = {"block_m": m, "block_n": m, "L": L, "S": L}
        plain = Plan(SparseLayout.from_dense_mask(blocks, **shape))
        both = Plan(SparseLayout.from_dense_mask(blocks, columns=columns, column_group=group, **shape))
        cases = {"plain": _Case(_attend(q, k, v, plain)), "both": _Case(_attend(q, k, v, both))}
        _best(cases, rounds, q.device.type)
        entries = _counts(q, k, v, both)["columns"]
        us = 1e6 * max(cases["both"].best - cases["plain"].best, 0.0) / entries * COLUMNS
        rows.append(
            TileRow("columns", dim, _name(q.dtype), m, COLUMNS, _round(both.layout.density(True)), _round(us))
        )
    return rows


def _call_us(q: Tensor, k: Tensor, v: Tensor, rounds: int) -> float:
    """A call on a single block of tokens."""
    m = 64 if q.is_cuda else 16
    q, k, v = (x[:, :1, :m].contiguous() for x in (q, k, v))
    plan = Plan(SparseLayout.full(m, m, block_m=m, block_n=m, device=q.device))
    cases = {"call": _Case(_attend(q, k, v, plan))}
    _best(cases, rounds * 20, q.device.type)
    return _round(1e6 * cases["call"].best)


def _copy_us_per_mib(q: Tensor, rounds: int) -> float:
    """Picking every other head."""
    pick = torch.arange(0, q.shape[1], 2, device=q.device)
    cases = {"copy": _Case(lambda: q.index_select(1, pick))}
    _best(cases, rounds * 4, q.device.type)
    mib = q[:, ::2].numel() * q.element_size() / 2**20
    return _round(1e6 * cases["copy"].best / mib)


def _select_rows(ways: _Ways, length: int, dim: int, device: str, rounds: int) -> list[SelectRow]:
    """Every kind of selection of the default candidates, causal or not, that reads queries and keys."""
    q, k, v = _inputs(ways, length, dim, ways.dtypes[0], device)
    rows = []
    for is_causal in (True, False):
        kinds = {
            select_key(c.method, c.config): c
            for c in default_candidates(
                Shape(length, ways.heads, ways.key_heads, dim, is_causal, device=device)
            )
            if c.method not in BY_SHAPE
        }
        times = select_us(kinds, Call(0, q, k, v, is_causal, dim**-0.5, prompt_len=0), rounds)
        rows += [SelectRow(key, dim, length, *us) for key, us in times.items()]
    return rows


def select_us(kinds: dict[str, Candidate], call: Call, rounds: int) -> dict[str, tuple[float, float]]:
    """Microseconds of each candidate's selection on these queries and keys: a query head, and a call.

    From two calls, with all heads and with those of the first key head.
    """
    heads, group = call.q.shape[1], call.q.shape[1] // call.k.shape[1]
    few = replace(call, q=call.q[:, :group], k=call.k[:, :1])

    def select(c: Candidate, on: Call) -> Callable[[], object]:
        context = Context(prompt_len=on.prompt_len)
        return lambda: c.info.select(
            on.q, on.k, c.config, is_causal=on.is_causal, scale=on.scale, context=context
        )

    cases = {(key, on is few): _Case(select(c, on)) for key, c in kinds.items() for on in (call, few)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # S2's, of a context that its heads do not cover
        _best(cases, rounds, call.q.device.type)
    found = {}
    for key in kinds:
        whole, part = 1e6 * cases[key, False].best, 1e6 * cases[key, True].best
        head = whole / heads if heads == group else max(whole - part, 0.0) / (heads - group)
        found[key] = _round(head), _round(max(whole - heads * head, 0.0))
    return found


def _round(x: float) -> float:
    """Four significant digits: more is noise."""
    return float(f"{x:.4g}")
