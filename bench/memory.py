"""Peak memory: what selecting and attending allocate beyond their inputs.

The allocator's own record is read (`torch.profiler` with memory), so that temporaries inside operators
count and the suite runs on a machine without a GPU too.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_attn.bench.cases import Bar, Case
from sparse_attn.bench.problem import Problem, make_tensors, select
from sparse_attn.bench.runner import Options, Outcome, Row
from sparse_attn.bench.suites import method_cases
from sparse_attn.index_list import IndexList
from sparse_attn.layout import SparseLayout

GIB = 1 << 30
FULL_LENGTH, FULL_HEADS = 131072, 32  # the size at which the 1 GiB bar is stated
# From here on S x S bytes (64 MiB) are more than inputs and fixed-size working buffers.
SQUARE_LENGTH = 8192


@dataclass(frozen=True)
class Peak:
    """What one call allocated.

    Attributes:
        peak_bytes: the most that was held at once above what was held before.
        largest_bytes: the largest single allocation.
        result: what the call returned.
    """

    peak_bytes: int
    largest_bytes: int
    result: Any


def peak_memory(call: Callable[[], Any], device: str) -> Peak:
    """Run a call under the allocator's record.

    Args:
        device: "cpu" or "cuda": whose allocations count.
    """
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    record = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _quiet():
        record.start()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    with _quiet():
        record.stop()
    wanted = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    profiler: Any = record.profiler
    events = [
        event
        for event in profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == wanted
    ]
    held = peak = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak, largest = max(peak, held), max(largest, event.nbytes())
    if device == "cuda":  # the allocator's own high-water mark
        peak = torch.cuda.max_memory_allocated() - before
        largest = largest or peak  # no single allocation is larger than the peak
    return Peak(peak, largest, result)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler's C++ side writes to standard error when it starts and stops."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def layout_bytes(layout: SparseLayout) -> int:
    """Bytes of a layout's lists and of everything cached on it."""
    parts: list[object] = [layout.blocks, layout.columns, *layout._cache.values()]
    storages = {}
    for part in parts:
        for tensor in (part.offsets, part.indices) if isinstance(part, IndexList) else (part,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def run_memory(options: Options, *, length: int, heads: int) -> Outcome:
    """One row a method: what its selection and its attention allocate."""
    outcome = Outcome()
    for case in method_cases(length, heads, options.device == "cuda"):
        try:
            row = measure_case(case, options)
        except (NotImplementedError, ValueError) as error:
            outcome.leave_out(case.name, str(error).splitlines()[0], options.log)
            continue
        outcome.rows.append(row)
        options.on_rows([row])
    return outcome


def measure_case(case: Case, options: Options) -> Row:
    """Peak of the selection above inputs and layout, and of the attention above inputs and output."""
    device = options.device
    q, k, v = make_tensors(case, device)
    selection = peak_memory(lambda: select(case, q, k), device)
    plan = selection.result
    layout_size = layout_bytes(plan.layout)
    problem = Problem(case, q, k, v, plan, plan.layout.density(case.is_causal))
    attention = peak_memory(lambda: problem.attend(options.engine), device)
    out = attention.result
    out_bytes = sum(x.numel() * x.element_size() for x in (out.out, out.lse))
    square = case.length**2
    return {
        "case": case.name,
        "provider": "ours" if options.engine is None else f"ours-{options.engine}",
        "step": "memory",
        "length": case.length,
        "heads": case.q_heads,
        "dtype": case.dtype,
        "density": round(problem.density, 6),
        "layout_bytes": layout_size,
        "selection_extra_bytes": max(selection.peak_bytes - layout_size, 0),
        "selection_extra_gib": round(max(selection.peak_bytes - layout_size, 0) / GIB, 5),
        "attention_extra_bytes": max(attention.peak_bytes - out_bytes, 0),
        "largest_over_square": round(max(selection.largest_bytes, attention.largest_bytes) / square, 5),
    }


def memory_bars(length: int, heads: int) -> list[Bar]:
    """Nothing as large as S x S bytes (from a length on at which that means something), and at S131072
    H32 at most 1 GiB for a selection."""
    bars: list[Bar] = []
    for case in method_cases(length, heads, False):
        if length < SQUARE_LENGTH:
            break
        bars.append(
            Bar(
                f"{case.name}: largest allocation, S x S bytes = 1", case.name, "largest_over_square",
                "largest single allocation of selection or attention / S^2 bytes", "memory", at_most=0.999,
                unit="S^2",
            )
        )  # fmt: skip
        if length >= FULL_LENGTH and heads >= FULL_HEADS:
            bars.append(
                Bar(
                    f"{case.name}: selection above inputs and layout", case.name, "selection_extra_gib",
                    "peak of the allocator during the selection, less the layout", "memory", at_most=1.0,
                    unit="GiB",
                )
            )  # fmt: skip
    return bars
