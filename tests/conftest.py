"""Set up every test: Triton's interpreter where there is no GPU, and outputs that start as NaN."""

from __future__ import annotations

import os

import pytest
import torch

# Triton reads this once, when it is imported, so it is set here, before any test module is. Without a
# GPU the interpreter runs the very kernels on CPU tensors. It is thousands of times slower than any
# other engine, so `choose` never takes it unasked: tests that name no engine get "cpu" or "reference"
# with or without this variable, and tests of the Triton engine name it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A user's own choice of engine must not leak into tests; those about the variable set it themselves.
os.environ.pop("SPARSE_ATTN_ENGINE", None)

_POISON = {torch.uint8: 85, torch.int32: 0x5A5A5A5A}


def _poisoned(make):
    """Wrap a function that returns uninitialised memory so that the memory holds NaN (or nonsense)."""

    def poisoned_empty(*args, **kwargs):
        x = make(*args, **kwargs)
        if x.device.type == "meta" or x.numel() == 0:
            return x
        with torch.no_grad():
            if x.is_floating_point():
                x.fill_(torch.nan)
            elif x.dtype in _POISON:
                x.fill_(_POISON[x.dtype])
        return x

    return poisoned_empty


@pytest.fixture(autouse=True)
def nan_filled_outputs(request, monkeypatch):
    """Make `torch.empty` and its relatives give NaN, so that an element an engine never wrote, or read
    before writing, shows in its result. The mark `plain_empty` switches it off."""
    if request.node.get_closest_marker("plain_empty"):
        return
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture
def on_vectors(monkeypatch):
    """The CPU engine without AMX tiles, where sums do not depend on where in a tensor queries and keys lie,
    nor on their number: for tests of equal bits."""
    monkeypatch.setenv("SPARSE_ATTN_CPU_ISA", "baseline")


@pytest.fixture
def epyc_times(monkeypatch):
    """A search's default times are those of one machine, whatever the tests run on."""
    from sparse_attn.search import cost

    monkeypatch.setattr(cost, "device_name", lambda device_type: "AMD EPYC avx2")
    cost.shipped_table.cache_clear()
    yield
    cost.shipped_table.cache_clear()


@pytest.fixture
def cpu_engine():
    """For a test of what only the compiled CPU engine does."""
    from sparse_attn.engines import ENGINES

    if reasons := ENGINES["cpu"].why_off():
        pytest.skip("; ".join(reasons))


@pytest.fixture
def calls(monkeypatch, on_vectors, cpu_engine) -> list:
    """The calls of the CPU engine."""
    from sparse_attn.engines import ENGINES

    made: list = []
    forward = type(ENGINES["cpu"]).forward

    def counted(self, call):
        made.append(call)
        return forward(self, call)

    monkeypatch.setattr(type(ENGINES["cpu"]), "forward", counted)
    return made


def pytest_configure(config):
    config.addinivalue_line("markers", "plain_empty: leave torch.empty uninitialised (torch.compile tests)")
