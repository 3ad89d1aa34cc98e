"""What is particular to the C++ engine: instruction sets, threads, tiles larger than its own, conversions,
layouts that are not valid, and a build that fails. test_engines.py holds the tests of every engine."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_attn import Plan, SparseLayout, attend, build, library
from sparse_attn.engines import ENGINES
from sparse_attn.index_list import IndexList
from sparse_attn.testing import check_engine, make_inputs, random_layout

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SETS = ("baseline", "avx2", "avx512", "amx")

needs_library = pytest.mark.skipif(bool(ENGINES["cpu"].why_off()), reason="; ".join(ENGINES["cpu"].why_off()))


def runnable(name: str, monkeypatch) -> bool:
    """Force an instruction set; False where this machine lacks it."""
    monkeypatch.setenv("SPARSE_ATTN_CPU_ISA", name)
    try:
        return ENGINES["cpu"].instruction_set() == name
    except ValueError as error:
        assert f"SPARSE_ATTN_CPU_ISA is '{name}'; this machine runs: " in str(error)
        return False


def gradients(inputs, plan, **options):
    """out, lse, dq, dk, dv for fixed gradients of out and lse."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    got = attend(*leaves, plan, engine="cpu", **options)
    generator = torch.Generator().manual_seed(5)
    grad_out = torch.randn(got.out.shape, generator=generator).to(got.out)
    return got.out, got.lse, *torch.autograd.grad(got.out, leaves, grad_out)


# -- instruction sets ----------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
def test_each_instruction_set(name, dtype, monkeypatch):
    if not runnable(name, monkeypatch):
        pytest.skip(f"this machine does not run {name}")
    inputs = make_inputs(heads=4, kv_heads=2, L=100, S=133, head_dim=40, value_dim=72, dtype=dtype)
    layout = random_layout("columns", 100, 133, block_m=24, block_n=20, heads=4)
    check_engine(*inputs, Plan(layout), engine="cpu", is_causal=True, grad=True)


@needs_library
def test_wide_sets_agree_bit_for_bit(monkeypatch):
    """A lane computes the same in a register of any width."""
    inputs = make_inputs(heads=2, L=150, S=150, head_dim=64)
    plan = Plan(random_layout("columns", 150, 150, heads=2))
    results = [
        gradients(inputs, plan, is_causal=True) for name in ("avx2", "avx512") if runnable(name, monkeypatch)
    ]
    if len(results) < 2:
        pytest.skip("this machine does not run both avx2 and avx512")
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@needs_library
def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("SPARSE_ATTN_CPU_ISA", "mmx")
    q, k, v = make_inputs(L=8, S=8)
    with pytest.raises(
        ValueError, match=r"^cpu engine: SPARSE_ATTN_CPU_ISA is 'mmx'; this machine runs: .*baseline"
    ):
        attend(q, k, v, Plan(SparseLayout.full(8, 8)), engine="cpu")


# -- threads -------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("kind", ["random", "columns", "empty_rows"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_thread_count_does_not_change_a_bit(kind, dtype):
    inputs = make_inputs(batch=2, heads=4, kv_heads=2, L=600, S=700, head_dim=32, dtype=dtype)
    plan = Plan(random_layout(kind, 600, 700, batch=2, heads=4, column_group=3))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(gradients(inputs, plan, is_causal=True, enable_gqa=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)


# -- block sizes -----------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize(
    "block", [(1, 1), (7, 13), (17, 150), (150, 17), (200, 300), (512, 512)], ids=lambda b: f"{b[0]}x{b[1]}"
)
def test_block_sizes_below_above_and_beside_the_tiles(block, skip):
    """The kernels work on 128 queries by 128 keys at most; a vote spans the whole block all the same."""
    small = block == (1, 1)
    L, S = (21, 34) if small else (333, 401)
    q, k, v = make_inputs(heads=2, L=L, S=S, head_dim=24, value_dim=33)
    layout = random_layout("random", L, S, block_m=block[0], block_n=block[1], heads=2, density=0.7)
    limit = torch.full((1, 2), math.log(0.3)) if skip else None
    got = check_engine(3 * q, k, v, Plan(layout, limit), engine="cpu", is_causal=True, grad=True)
    if skip and block[0] < 100:
        listed = check_engine(3 * q, k, v, Plan(layout), engine="cpu", is_causal=True).kept.sum()
        assert 0 < got.kept.sum() < listed, "the case skips nothing, or everything"


@needs_library
def test_long_column_lists_and_gradients():
    """More columns than one chunk of keys, and than one range of the dk/dv pass."""
    q, k, v = make_inputs(heads=4, kv_heads=2, L=90, S=1300, head_dim=16)
    layout = random_layout("only_columns", 90, 1300, block_m=16, heads=2, column_group=4)
    assert int(layout.columns.lengths.max()) > 256
    check_engine(q, k, v, Plan(layout), engine="cpu", is_causal=True, grad=True)


# -- numbers ---------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("dtype", [F16, BF16], ids=["f16", "bf16"])
def test_every_16_bit_number_converts(dtype):
    """One key a head gives its value back; two with equal logits give the rounded mean."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    value = bits.view(1, 256, 1, 256)
    q = torch.zeros(1, 256, 1, 16, dtype=dtype)
    one = attend(q, q, value, Plan(SparseLayout.full(1, 1)), engine="cpu").out
    assert torch.equal(one.isnan(), value.isnan())
    assert (one == value)[~value.isnan()].all()

    pair = torch.cat([value, value.flatten().roll(7).view_as(value)], 2)
    key = torch.zeros(1, 256, 2, 16, dtype=dtype)
    mean = attend(q, key, pair, Plan(SparseLayout.full(1, 2)), engine="cpu").out
    expected = (pair.float().sum(2, keepdim=True) * 0.5).to(dtype)
    assert torch.equal(mean.isnan(), expected.isnan())
    assert (mean == expected)[~expected.isnan()].all()


@needs_library
def test_exponentials_to_the_last_places():
    """One query, keys whose logits fall from 0 to -110: each key's weight against float64."""
    logits = -torch.linspace(0, 110, 4096)
    value = torch.zeros(1, 1, 4096, 256)
    q, key = torch.ones(1, 1, 1, 1), logits.view(1, 1, 4096, 1)
    worst = 0.0
    for start in range(0, 4096, 256):
        value.zero_()[0, 0, start : start + 256] = torch.eye(256)
        plan = Plan(SparseLayout.full(1, 4096, block_n=64))
        got = attend(q, key, value, plan, scale=1.0, engine="cpu")
        weight = got.out[0, 0, 0].double() * got.lse.double().exp().item()
        exact = logits[start : start + 256].double().exp()
        normal = exact > 1.2e-38
        assert (weight[~normal] == 0).all() or (weight[~normal] < 1.3e-38).all()
        close = logits[start : start + 256] > -20
        if close.any():
            worst = max(worst, ((weight - exact) / exact)[close].abs().max().item())
    assert worst < 1.5e-6, worst  # lse, its exp and the weight: a dozen units in the last place


@needs_library
@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.7])
@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_any_sign_of_the_scale(scale, skip):
    """The kernels take the largest score of a tile for its largest logit, which a scale below 0 turns."""
    inputs = make_inputs(heads=2, L=70, S=90, head_dim=32)
    layout = SparseLayout.full(70, 90, block_m=32, block_n=16)
    plan = Plan(layout, torch.full((1, 2), -2.0) if skip else None)
    check_engine(*inputs, plan, engine="cpu", is_causal=True, scale=scale, grad=True)


@needs_library
@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_output_written_into_heads_of_a_larger_tensor(engine):
    q, k, v = make_inputs(heads=2, L=50, S=50, head_dim=32)
    plan = Plan(random_layout("columns", 50, 50, heads=2))
    layer = torch.full((1, 50, 5, 32), math.nan).transpose(1, 2)
    got = attend(q, k, v, plan, is_causal=True, engine=engine, out=layer[:, 1:3])
    plain = attend(q, k, v, plan, is_causal=True, engine=engine)
    assert got.out.data_ptr() == layer[:, 1:3].data_ptr()
    assert torch.equal(layer[:, 1:3], plain.out)
    assert torch.equal(got.lse, plain.lse)
    assert layer[:, [0, 3, 4]].isnan().all()


@pytest.mark.parametrize("case", ["shape", "dtype", "stride", "gradients"])
def test_output_that_cannot_be_written_into(case):
    q, k, v = make_inputs(heads=2, L=8, S=8, head_dim=32)
    out = {
        "shape": torch.empty(1, 2, 9, 32),
        "dtype": torch.empty(1, 2, 8, 32, dtype=torch.float64),
        "stride": torch.empty(1, 2, 32, 8).mT,
        "gradients": torch.empty(1, 2, 8, 32),
    }[case]
    q.requires_grad_(case == "gradients")
    with pytest.raises(ValueError, match=r"^attend: out must be \(1, 2, 8, 32\) in torch.float32"):
        attend(q, k, v, Plan(SparseLayout.full(8, 8, block_m=8, block_n=8)), out=out)


@needs_library
def test_large_logits_and_nan():
    q, k, v = make_inputs(L=70, S=70, heads=1)
    check_engine(300 * q, 300 * k, v, Plan(SparseLayout.full(70, 70, block_n=16)), engine="cpu")
    q[0, 0, 3, 5] = torch.nan
    out, lse = (lambda got: (got.out, got.lse))(
        attend(q, k, v, Plan(SparseLayout.full(70, 70)), engine="cpu")
    )
    assert out[0, 0, 3].isnan().all() and lse[0, 0, 3].isnan()
    assert out.isnan().sum() == out.shape[-1], "a NaN query touched another query"


@needs_library
def test_no_pair_of_lengths_sized_buffer():
    """A call whose score matrix alone would take 4 GiB runs in a process that may take 1.5 GiB more."""
    code = (
        "import resource, torch, sparse_attn as sa\n"
        "S = 32768\n"
        "q = torch.randn(1, 1, S, 16).bfloat16()\n"
        "layout = sa.SparseLayout.window(S, S, left=1)\n"
        "sa.sparse_attention(q[:, :, :64], q[:, :, :64], q[:, :, :64], sa.SparseLayout.full(64, 64))\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 29),) * 2)\n"
        "print(sa.sparse_attention(q, q, q, layout, is_causal=True, engine='cpu').isfinite().all().item())\n"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr


# -- what it refuses -------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("indices", [[0, 9], [0, -1], [1, 0], [1, 1]], ids=str)
def test_a_layout_that_is_not_valid_is_refused(indices):
    """Out of range or out of order: an error that names the check, never a read outside a tensor."""
    q, k, v = make_inputs(L=32, S=128)
    rows = IndexList(torch.tensor([0, 2]), torch.tensor(indices, dtype=torch.int32))
    layout = SparseLayout(rows, 32, 64, 32, 128)
    with pytest.raises(
        ValueError, match=r"^cpu engine: the layout's blocks are not valid: call layout\.check\(\)"
    ):
        attend(q, k, v, Plan(layout), engine="cpu")


def test_float64_is_left_to_the_reference():
    q, k, v = make_inputs(L=8, S=8, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="takes float32, bfloat16 and float16"):
        attend(q, k, v, Plan(SparseLayout.full(8, 8)), engine="cpu")
    assert attend(q, k, v, Plan(SparseLayout.full(8, 8))).out.dtype == torch.float64


# -- the build -------------------------------------------------------------------------------------------


@pytest.fixture
def no_library(tmp_path, monkeypatch) -> Path:
    """An empty cache and a package folder without libraries; returns the cache."""
    sources = build.source_dir()
    monkeypatch.setattr(build, "source_dir", lambda: sources)
    monkeypatch.setattr(build, "PACKAGE", tmp_path / "package")
    monkeypatch.setenv("SPARSE_ATTN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_not_built_names_the_command(no_library):
    assert library.find("cpu") == "its cpu library is not built; run `sparse-attn build`."


def test_built_from_other_sources(no_library):
    no_library.mkdir()
    (no_library / "cpu-0123456789abcdef-01234567.so").touch()
    assert library.find("cpu") == "its cpu library was built from other sources; run `sparse-attn build`."


def test_a_failed_build_keeps_the_compilers_words(no_library, tmp_path, monkeypatch, capsys):
    compiler = tmp_path / "broken-c++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "broken-c++: no such option" >&2\nexit 3\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(SystemExit):
        build.build_command("cpu")
    for told in (capsys.readouterr().err, library.find("cpu")):
        assert "failed with status 3:\nbroken-c++: no such option" in told
    assert "run `sparse-attn build`" in library.find("cpu")
    assert not list(no_library.glob("*.so*"))


def test_a_library_that_does_not_load(no_library, monkeypatch):
    no_library.mkdir()
    (no_library / f"cpu-{build.source_hash('cpu')}-01234567.so").write_bytes(b"not an ELF file")
    reason = library.load.__wrapped__("cpu")
    assert "does not load (" in reason
    assert "invalid ELF header" in reason or "file too short" in reason
    assert "run `sparse-attn build` --force" in reason


def test_no_compiler(no_library, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler: install g\+\+ 11 or newer"):
        build.build_to("cpu", no_library / "x.so")


def test_old_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    assert "needs torch 2.11 or newer; this is 2.10.1+cpu" in library.load.__wrapped__("cpu")


@pytest.mark.parametrize("value", ["0", "two", "-1"])
def test_bad_max_jobs(value, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", value)
    with pytest.raises(build.BuildError, match=f"MAX_JOBS is '{value}'"):
        build.max_jobs()


def test_wanted_kinds(monkeypatch):
    for value, kinds in (("cpu", ["cpu"]), ("cuda", ["cuda"]), ("none", [])):
        monkeypatch.setenv("SPARSE_ATTN_BUILD", value)
        assert build.wanted_kinds() == kinds
    assert build.wanted_kinds("cpu") == ["cpu"], "an argument goes before the variable"
    monkeypatch.setenv("SPARSE_ATTN_BUILD", "rocm")
    with pytest.raises(build.BuildError, match="'rocm'; it must be auto, cpu, cuda or none"):
        build.wanted_kinds()


def test_arch_list(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert build.gencode_flags() == ["-gencode=arch=compute_90a,code=sm_90a"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a;10.0+PTX")
    assert build.gencode_flags() == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(build.BuildError, match="holds 'Hopper'"):
        build.gencode_flags()


def test_cuda_sources_become_nvcc_calls(no_library, tmp_path, monkeypatch):
    """A .cu file anywhere under csrc/ is compiled for the architectures asked for; cpu/ stays out of it."""
    sources = tmp_path / "csrc"
    (sources / "cpu").mkdir(parents=True)
    (sources / "cpu/attend.cpp").write_text("")
    (sources / "hopper/instances").mkdir(parents=True)
    (sources / "hopper/instances/fwd.cu").write_text("")
    tool = tmp_path / "bin/nvcc"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setattr(build, "source_dir", lambda: sources)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    (step,) = build.cuda_steps(tmp_path)
    assert step.command[0] == str(tool) and str(sources / "hopper/instances/fwd.cu") in step.command
    assert "-gencode=arch=compute_90a,code=sm_90a" in step.command
    monkeypatch.delenv("SPARSE_ATTN_BUILD", raising=False)
    monkeypatch.setattr(build, "GPU_DEVICE", tmp_path / "no-gpu")
    assert build.wanted_kinds() == ["cpu"], "nvcc alone is no reason to wait for it"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert build.wanted_kinds() == ["cpu", "cuda"], "an architecture was asked for"
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(build, "GPU_DEVICE", tmp_path)
    assert build.wanted_kinds() == ["cpu", "cuda"], "there is a GPU"


SPILLS = "ptxas warning : Registers are spilled to local memory in function 'k', 8 bytes spill stores"
SERIAL = "ptxas info : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to"


@pytest.mark.parametrize(("words", "is_slow"), [("", False), (SPILLS, True), (SERIAL, True)])
def test_a_kernel_that_spills_or_serialises_fails_the_compile_check(
    tmp_path, monkeypatch, capsys, words, is_slow
):
    sources = tmp_path / "csrc"
    (sources / "hopper").mkdir(parents=True)
    (sources / "hopper/fwd.cu").write_text("")
    tool = tmp_path / "bin/nvcc"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\ncase "$*" in *-warn-spills*) echo "{words}";; esac\n')
    tool.chmod(0o755)
    monkeypatch.setattr(build, "source_dir", lambda: sources)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    if is_slow:
        with pytest.raises(build.BuildError, match="not to run at full speed:\nptxas"):
            build.compile_cuda_only()
    else:
        build.compile_cuda_only()
        assert "compiled 1 files" in capsys.readouterr().out


def test_a_source_change_renames_the_library(tmp_path, monkeypatch):
    (tmp_path / "cpu").mkdir()
    file = tmp_path / "cpu/attend.cpp"
    monkeypatch.setattr(build, "source_dir", lambda: tmp_path)
    seen = set()
    for text in ("int a;", "int b;"):
        file.write_text(text)
        seen.add(build.source_hash("cpu"))
    assert len(seen) == 2
