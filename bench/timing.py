"""Timing: every provider in turn, round after round, so that ratios compare times taken side by side.

A machine's speed drifts (clocks, other processes). Medians of separate runs carry that drift into a
ratio; here each round times every provider once, and ratios are formed inside a round.

On CUDA a call has two costs: what the GPU does, and what the host spends until the call returns. Events
around a call measure the first only if the GPU never waits for the host, so it is kept busy with a spin
while the host launches; the second is taken apart, with a clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

Run = Callable[[], object]

MIN_CPU_SAMPLE_MS = 20.0  # shorter calls are repeated, so that the clock and the call overhead vanish
SPIN_MS = 2.0  # longer than the host takes to launch any call here
L2_FLUSH_BYTES = 256 << 20  # as triton.testing.do_bench: larger than any L2 cache of today


@dataclass(frozen=True)
class Times:
    """Milliseconds of one provider, one value a round.

    Attributes:
        rounds: on CUDA, the GPU's time; on CPU, the call's.
        host_us: on CUDA, microseconds until the call returned; empty on CPU.
    """

    rounds: list[float]
    host_us: list[float] = field(default_factory=list)

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


def paired_best_ratio(above: list[Times], below: Times) -> float:
    """Median over rounds of (the fastest of `above` in that round) / below."""
    fastest = Times([min(values) for values in zip(*(x.rounds for x in above), strict=True)])
    return paired_ratio(fastest, below)


def measure(
    runs: dict[str, Run],
    device: str,
    *,
    rounds: int,
    warmup: int = 2,
    budget_s: float | None = None,
    drop: Callable[[str, Exception], None] | None = None,
) -> dict[str, Times]:
    """Time every run once a round, in an order that changes from round to round (`order_of_round`).

    Args:
        runs: name -> call. On CUDA the level-2 cache is flushed before each call, outside the time.
        device: "cpu" or "cuda".
        rounds: at most this many; at least 3.
        budget_s: stop after the third or a later round once this much time is gone.
        drop: told of a run that raises, which is then left out of the result; it may raise itself.
            None lets the exception through.
    """
    once = _CudaClock() if device == "cuda" else _CpuClock()
    runs, times = dict(runs), {name: Times([]) for name in runs}

    def guarded(name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            if drop is None:
                raise
            drop(name, error)
            del runs[name], times[name]

    for name, run in list(runs.items()):
        for _ in range(warmup if device == "cuda" else 1):
            if name in runs:
                guarded(name, partial(once.warm, run))
    start = time.perf_counter()
    for number in range(max(rounds, 3)):
        names = list(runs)
        for place in order_of_round(len(names), number):
            guarded(names[place], partial(once, names[place], runs[names[place]], times[names[place]]))
        if budget_s is not None and number >= 2 and time.perf_counter() - start > budget_s:
            break
    return times


def order_of_round(count: int, number: int) -> list[int]:
    """Round `number` of `count` runs, from a Williams square: within `count` rounds (twice as many if that is
    odd) every run comes right after every other equally often. What ran before matters: a card at its
    power limit is slower after a hot kernel than after a cool one, by 4 % on an H200."""
    zigzag = [(i + 1) // 2 if i % 2 else -i // 2 for i in range(count)]  # 0, 1, -1, 2, -2, ...
    shift, is_turned = (number, 0) if count % 2 == 0 else divmod(number, 2)
    order = [(place + shift) % count for place in zigzag]
    return order[::-1] if is_turned else order


def cpu_us(call: Callable[[], object], calls: int = 100, repeats: int = 40) -> float:
    """Microseconds of this thread's own processor time a call, the least of many: other load adds nothing."""
    best = float("inf")
    for _ in range(repeats):
        start = time.thread_time()
        for _ in range(calls):
            call()
        best = min(best, (time.thread_time() - start) / calls)
    return round(best * 1e6, 1)


class _CpuClock:
    def __init__(self) -> None:
        self.repeats: dict[str, int] = {}

    def warm(self, run: Run) -> None:
        run()

    def __call__(self, name: str, run: Run, times: Times) -> None:
        repeats = self.repeats.get(name, 1)
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        ms = (time.perf_counter() - start) * 1e3
        if name not in self.repeats:
            self.repeats[name] = max(1, round(MIN_CPU_SAMPLE_MS / max(ms, 1e-3)))
            if self.repeats[name] > 1:
                return self(name, run, times)
        times.rounds.append(ms / repeats)


class _CudaClock:
    def __init__(self) -> None:
        self.flush = torch.empty(L2_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
        self.spin_cycles = self._cycles(SPIN_MS)

    def warm(self, run: Run) -> None:
        run()
        torch.cuda.synchronize()

    def __call__(self, name: str, run: Run, times: Times) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(self.spin_cycles)
        start.record()
        begun = time.perf_counter()
        run()
        host_us = (time.perf_counter() - begun) * 1e6
        end.record()
        torch.cuda.synchronize()
        times.rounds.append(start.elapsed_time(end))
        times.host_us.append(host_us)

    @staticmethod
    def _cycles(ms: float, probe: int = 1_000_000) -> int:
        """Cycles that the GPU spins for about so many milliseconds."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):  # the first one wakes the clocks up
            start.record()
            torch.cuda._sleep(probe)
            end.record()
            torch.cuda.synchronize()
        return round(ms / start.elapsed_time(end) * probe)
