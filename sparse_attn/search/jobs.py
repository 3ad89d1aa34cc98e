"""Measuring with several processes, each on layers of its own, and on a GPU of its own.

    found = search(model, Budget(perplexity=0.01), work="llama.search", jobs=Jobs(4, load_model))

Every process loads the model and runs the same dense pass; it measures the layers whose number leaves its
rank when divided by the number of processes. They share the work folder, in which each layer has a file of
its own, so that nothing is measured twice, and a killed search goes on with any number of jobs.
"""

from __future__ import annotations

import signal
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_attn.search.models import Model
from sparse_attn.search.rules import Progress

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Jobs:
    """Processes for the measurements.

    Attributes:
        count: how many, at least 1. On a GPU machine rank r works on GPU r modulo their number; on a CPU each
            uses as many threads as this process (`OMP_NUM_THREADS`), because a model's sums depend on that.
        make: rank -> the model, with the same samples as the caller's; a function of a module, since the
            processes import it.

    Raises:
        ValueError: count is below 1.
    """

    count: int
    make: Callable[[int], Model]

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"search: jobs is {self.count}; use 1 or more.")

    def measure(self, work: Path, options: dict[str, Any], total: int, progress: Progress) -> None:
        """Measure all that is missing in `work`, a folder that a `Search` of the same options has made.

        Args:
            options: of `Search`, without `resume` and `progress`.
            total: layers of all samples.

        Raises:
            ValueError: a process failed; its own message stands above on stderr. KeyboardInterrupt: Ctrl-C or
                SIGTERM; the processes have ended.
        """
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=self.count, run_id=uuid.uuid4().hex, max_restarts=0,
            rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.1, start_method="spawn",
        )  # fmt: skip
        done = threading.Event()
        progress.stage(f"measuring in {self.count} processes", total)
        watch = threading.Thread(target=_watch, args=(work / "measures", progress, done), daemon=True)
        watch.start()
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            elastic_launch(config, _job)(self.make, work, options, torch.get_num_threads())
        except SignalException:
            raise KeyboardInterrupt from None
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            raise ValueError(
                f"search: process {rank} of {self.count} failed (exit code {failure.exitcode}; its message "
                "is above). What was measured is kept: mend it and go on with --resume."
            ) from None
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():  # the launcher leaves its own
                    signal.signal(number, handler)
            done.set()
            watch.join()


def _job(make: Callable[[int], Model], work: Path, options: dict[str, Any], threads: int) -> None:
    """One process."""
    from torch import distributed

    from sparse_attn.search.run import Search  # late: `run` imports this module

    torch.set_num_threads(threads)
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(rank % torch.cuda.device_count())
        Search(make(rank), work, **options, resume=True, part=(rank, size)).measure()
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def _watch(folder: Path, progress: Progress, done: threading.Event) -> None:
    """Advance with every file that appears."""
    seen = 0
    while True:
        finished = done.wait(POLL_SECONDS)
        now = len(list(folder.glob("*.json")))
        for _ in range(now - seen):
            progress.advance()
        seen = max(seen, now)
        if finished:
            return
