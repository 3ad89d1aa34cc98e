"""Timing: every provider in turn, round after round, so that ratios compare times taken side by side.

A machine's speed drifts (clocks, other processes). Medians of separate runs carry that drift into a
ratio; here each round times every provider once, and ratios are formed inside a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Run = Callable[[], object]

MIN_CPU_SAMPLE_MS = 20.0  # shorter calls are repeated, so that the clock and the call overhead vanish
L2_FLUSH_BYTES = 256 << 20  # as triton.testing.do_bench: larger than any L2 cache of today


@dataclass(frozen=True)
class Times:
    """Milliseconds of one provider, one value a round."""

    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def quantile(self, share: float) -> float:
        return quantile(self.rounds, share)

    def summary(self) -> dict[str, float]:
        return {
            "median": round(self.median, 5),
            "p10": round(self.quantile(0.1), 5),
            "p90": round(self.quantile(0.9), 5),
        }


def quantile(values: list[float], share: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def paired_ratio(above: Times, below: Times) -> float:
    """Median over rounds of above / below, each round on its own."""
    if len(above.rounds) != len(below.rounds):
        raise ValueError("paired_ratio: the two were not timed in the same rounds.")
    return statistics.median(a / b for a, b in zip(above.rounds, below.rounds, strict=True))


def measure(
    runs: dict[str, Run], device: str, *, rounds: int, warmup: int = 2, budget_s: float | None = None
) -> dict[str, Times]:
    """Time every run once a round, in an order that rotates from round to round.

    Args:
        runs: name -> call. On CUDA the level-2 cache is flushed before each call, outside the time.
        device: "cpu" or "cuda".
        rounds: at most this many; at least 3.
        budget_s: stop after the third or a later round once this much time is gone.
    """
    once = _CudaClock() if device == "cuda" else _CpuClock()
    for run in runs.values():
        for _ in range(warmup if device == "cuda" else 1):
            once.warm(run)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names, start = list(runs), time.perf_counter()
    for number in range(max(rounds, 3)):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(once(name, runs[name]))
        if budget_s is not None and number >= 2 and time.perf_counter() - start > budget_s:
            break
    return {name: Times(values) for name, values in samples.items()}


class _CpuClock:
    def __init__(self) -> None:
        self.repeats: dict[str, int] = {}

    def warm(self, run: Run) -> None:
        run()

    def __call__(self, name: str, run: Run) -> float:
        repeats = self.repeats.get(name, 1)
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        ms = (time.perf_counter() - start) * 1e3
        if name not in self.repeats:
            self.repeats[name] = max(1, round(MIN_CPU_SAMPLE_MS / max(ms, 1e-3)))
            if self.repeats[name] > 1:
                return self(name, run)
        return ms / repeats


class _CudaClock:
    def __init__(self) -> None:
        self.flush = torch.empty(L2_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def warm(self, run: Run) -> None:
        run()
        torch.cuda.synchronize()

    def __call__(self, name: str, run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
