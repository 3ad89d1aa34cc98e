"""What `sparse-attn info` says of the compiled CUDA kernels."""

from __future__ import annotations

import pytest

from sparse_attn import kernel_resources, library
from sparse_attn.info import collect, render
from sparse_attn.kernel_resources import KernelResources, cuobjdump, of_library, parse

TEXT = """
Fatbin elf code:
================
arch = sm_75

Resource usage:
 Common:
  GLOBAL:0

arch = sm_90a
Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function void sparse_attn::hopper::attend_fwd_kernel<sparse_attn::hopper::Kernel<__half, 64> >(Params, int):
  REG:168 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:1408 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN5other3runEv:
  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_registers_shared_memory_and_stack_are_read():
    assert parse(TEXT) == [
        KernelResources("attend_fwd_kernel<Kernel<__half, 64>>", "sm_90a", 168, 1024, 8),
        KernelResources("_ZN5other3runEv", "sm_90a", 40, 0, 0),
    ]


def test_a_library_that_is_not_there_gives_its_reason(monkeypatch):
    monkeypatch.setattr(library, "find", lambda kind: "it is not built; run `sparse-attn build`.")
    assert of_library("cuda") == "it is not built; run `sparse-attn build`."


def test_a_missing_tool_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "find", lambda kind: tmp_path / "x.so")
    monkeypatch.setattr(kernel_resources, "cuobjdump", lambda: None)
    assert "no cuobjdump" in of_library("cuda") and "CUDA_HOME" in of_library("cuda")


def test_a_failing_tool_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "find", lambda kind: tmp_path / "x.so")
    monkeypatch.setattr(kernel_resources, "cuobjdump", lambda: "/nowhere/cuobjdump")
    assert "/nowhere/cuobjdump failed" in of_library("cuda")


def test_the_real_library_is_read():
    path = library.find("cuda")
    if isinstance(path, str) or cuobjdump() is None:
        pytest.skip(f"needs the CUDA library and cuobjdump: {path}")
    facts = collect()
    kernels = facts["kernels"]
    assert kernels and all(0 < kernel["registers"] <= 255 for kernel in kernels)
    text = render(facts)
    assert "CUDA kernels" in text and all(kernel["name"] in text for kernel in kernels)
