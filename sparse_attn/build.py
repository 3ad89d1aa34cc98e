"""Compiling the C++ and CUDA parts: plain compiler commands, no build system.

One shared object a kind ("cpu", "cuda"), against the libtorch stable ABI: a binary works with every
Python and with every torch from 2.11 on. Called by setup.py at install, by `sparse-attn build` later.
This file imports nothing but the standard library at the top, so that setup.py can load it on its own;
torch is asked only where its headers and libraries lie.

Environment:
    SPARSE_ATTN_BUILD: auto (default: cpu, and cuda where nvcc and an NVIDIA GPU are found), cpu, cuda
        or none.
    MAX_JOBS: compiler processes at once; default the number of CPUs.
    TORCH_CUDA_ARCH_LIST: as PyTorch knows it; default 9.0a. Setting it also asks auto for cuda, so that
        a machine without a GPU can build for others.
    CXX, CUDA_HOME: which compilers to take.
    SPARSE_ATTN_CACHE: where `sparse-attn build` puts its libraries; default ~/.cache/sparse_attn.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11
MIN_TORCH = (2, 11)
KINDS = ("cpu", "cuda")
PACKAGE = Path(__file__).resolve().parent
GPU_DEVICE = Path("/dev/nvidiactl")  # there where the NVIDIA driver is

# The kernels are compiled once for each of these and chosen at run time, so that one binary runs on any
# machine of its architecture. -ffp-contract: a * b + c becomes one fused instruction.
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_X86_SETS = {
    "baseline": ["-march=x86-64"],
    "avx2": ["-march=x86-64", "-mavx2", "-mfma"],
    "avx512": ["-march=x86-64", "-mavx2", "-mfma", *_AVX512],
    "amx": ["-march=x86-64", "-mavx2", "-mfma", *_AVX512, "-mamx-tile", "-mamx-bf16"],
}
_CPP_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-Wall", "-Wextra", "-fvisibility=hidden"]
_KERNEL_FLAGS = [
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-exceptions", "-fno-rtti"),
]
_NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC", "-DUSE_CUDA", "-lineinfo", "--expt-relaxed-constexpr"]
_ALL_FLAGS = (_X86_SETS, _CPP_FLAGS, _KERNEL_FLAGS, _NVCC_FLAGS, TORCH_TARGET)


class BuildError(RuntimeError):
    """A library could not be built; the message holds the reason, the remedy and the compiler's words."""


@dataclass(frozen=True)
class Step:
    """One compiler call: `command` writes `target`."""

    target: Path
    command: tuple[str, ...]


# -- sources -------------------------------------------------------------------------------------------


def source_dir() -> Path | None:
    """csrc/ of an installed package or of a checkout; None where neither has it."""
    for place in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (place / "cpu").is_dir():
            return place
    return None


def source_files(kind: str) -> list[Path]:
    """The files that a kind is compiled from, headers included; [] if it has none."""
    root = source_dir()
    if root is None:
        return []
    endings = {"cpu": (".cpp", ".h"), "cuda": (".cu", ".cuh", ".h", ".cpp")}[kind]
    under_cpu = root / "cpu"
    files = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix in endings and (kind == "cpu") == path.is_relative_to(under_cpu)
    ]
    main = ".cu" if kind == "cuda" else ".cpp"
    return files if any(path.suffix == main for path in files) else []


def source_hash(kind: str) -> str:
    """16 hex digits that change with any source file of the kind or with the flags; "" without sources."""
    files = source_files(kind)
    if not files:
        return ""
    digest = hashlib.sha256(repr(_ALL_FLAGS).encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def cache_dir() -> Path:
    """Where `sparse-attn build` puts libraries and where they are looked for."""
    given = os.environ.get("SPARSE_ATTN_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse_attn"


# -- tools ---------------------------------------------------------------------------------------------


def torch_dir() -> Path:
    """The installed torch, found without importing it.

    Raises:
        BuildError: there is none, or it is too old.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed; install torch>=2.11, then run `sparse-attn build`.")
    place = Path(spec.origin).parent
    if not (place / "include/torch/csrc/stable/ops.h").exists():
        raise BuildError(f"the torch in {place} has no stable-ABI headers; torch>=2.11 is needed.")
    return place


def cpp_compiler() -> str:
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    for name in filter(None, names):
        if shutil.which(name.split()[0]):
            return name
    raise BuildError("no C++ compiler: install g++ 11 or newer (or set CXX), then run `sparse-attn build`.")


def nvcc() -> str | None:
    """The CUDA compiler of CUDA_HOME or of the path; None if there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def max_jobs() -> int:
    value = os.environ.get("MAX_JOBS", "")
    if value and (not value.isdigit() or int(value) < 1):
        raise BuildError(f"MAX_JOBS is {value!r}; it must be a positive whole number.")
    return int(value) if value else os.cpu_count() or 1


def gencode_flags() -> list[str]:
    """nvcc's -gencode for each entry of TORCH_CUDA_ARCH_LIST ("9.0a", "9.0a;10.0a", "9.0+PTX")."""
    flags = []
    for entry in os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0a").replace(" ", ";").split(";"):
        number, _, ptx = entry.partition("+")
        digits = number.replace(".", "")
        if not digits.rstrip("af").isdigit() or ptx not in ("", "PTX"):
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST holds {entry!r}; write versions such as 9.0a, divided by semicolons."
            )
        flags.append(f"-gencode=arch=compute_{digits},code=sm_{digits}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{digits},code=compute_{digits}")
    return flags


def run(command: tuple[str, ...] | list[str]) -> str:
    """Run one tool; returns what it printed.

    Raises:
        BuildError: it failed or cannot be started, with the command and its own message.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"cannot start {command[0]}: {error}") from error
    output = (done.stdout + done.stderr).strip()
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\nfailed with status {done.returncode}:\n{output[-4000:]}")
    return output


# -- commands ------------------------------------------------------------------------------------------


def cpu_steps(work: Path) -> list[Step]:
    """The compiler calls of the CPU library."""
    root = source_dir()
    assert root is not None
    compiler = cpp_compiler().split()
    machine = platform.machine().lower()
    sets = _X86_SETS if machine in ("x86_64", "amd64") else {"baseline": []}
    steps = []
    for name, flags in sets.items():
        target, source = work / f"kernels_{name}.o", root / "cpu/kernels.cpp"
        options = [*_CPP_FLAGS, *_KERNEL_FLAGS, *flags, f"-DSPARSE_ATTN_ISA={name}"]
        steps.append(Step(target, (*compiler, *options, "-c", str(source), "-o", str(target))))
    include = ["-isystem", str(torch_dir() / "include"), f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    for source in sorted((root / "cpu").glob("*.cpp")):
        if source.name != "kernels.cpp":
            target = work / f"{source.stem}.o"
            steps.append(
                Step(target, (*compiler, *_CPP_FLAGS, *include, "-c", str(source), "-o", str(target)))
            )
    return steps


def cuda_steps(work: Path) -> list[Step]:
    """The compiler calls of the CUDA library. They need nvcc, not a GPU."""
    root, compiler = source_dir(), nvcc()
    assert root is not None
    if compiler is None:
        raise BuildError("no nvcc: install the CUDA toolkit or set CUDA_HOME.")
    include = [f"-isystem={torch_dir() / 'include'}", f"-I{root}", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    steps = []
    for source in source_files("cuda"):
        if source.suffix not in (".cu", ".cpp"):
            continue
        target = work / (str(source.relative_to(root)).replace(os.sep, "_") + ".o")
        command = (compiler, *_NVCC_FLAGS, *gencode_flags(), *include, "-c", str(source), "-o", str(target))
        steps.append(Step(target, command))
    return steps


def link_command(kind: str, objects: list[Path], target: Path, work: Path) -> list[str]:
    libraries = [f"-L{torch_dir() / 'lib'}", "-ltorch_cpu", "-lc10"]
    if kind == "cuda":
        compiler = nvcc()
        assert compiler is not None
        libraries += ["-L" + str(_cuda_stub(work)), "-ltorch_cuda"]
        return [compiler, "-shared", *map(str, objects), "-o", str(target), *libraries]
    return [*cpp_compiler().split(), "-shared", *map(str, objects), "-o", str(target), *libraries]


def _cuda_stub(work: Path) -> Path:
    """A folder with a libtorch_cuda to link with: torch's own, or an empty one of that name where torch
    is a CPU build (the real one is there when the library runs)."""
    own = torch_dir() / "lib"
    if (own / "libtorch_cuda.so").exists():
        return own
    folder = work / "stub"
    folder.mkdir(exist_ok=True)
    source = folder / "stub.cpp"
    source.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n')
    name = "libtorch_cuda.so"
    options = ["-shared", "-fPIC", f"-Wl,-soname,{name}", str(source), "-o", str(folder / name)]
    run([*cpp_compiler().split(), *options])
    return folder


def compile_all(steps: list[Step]) -> str:
    """Run the steps on MAX_JOBS processes; returns what they printed. Raises the first failure."""
    with ThreadPoolExecutor(max_jobs()) as pool:
        return "\n".join(filter(None, pool.map(lambda step: run(step.command), steps)))


def build_to(kind: str, target: Path) -> Path:
    """Compile one kind into the file `target`, which appears whole or not at all.

    Raises:
        BuildError: no sources, no compiler, or a compiler's failure.
    """
    if not source_files(kind):
        raise BuildError(f"there are no {'CUDA' if kind == 'cuda' else 'C++'} sources to build.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sparse_attn_build_") as folder:
        work = Path(folder)
        steps = {"cpu": cpu_steps, "cuda": cuda_steps}[kind](work)
        compile_all(steps)
        linked = work / target.name
        run(link_command(kind, [step.target for step in steps], linked, work))
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copyfile(linked, partial)
        os.replace(partial, target)
    return target


def cached_path(kind: str) -> Path:
    """Where `sparse-attn build` puts a kind: named by the sources, then by compiler and flags."""
    compiler = nvcc() if kind == "cuda" else cpp_compiler()
    if compiler is None:
        raise BuildError("no nvcc: install the CUDA toolkit or set CUDA_HOME.")
    parts = [run([*compiler.split(), "--version"]), platform.machine()]
    parts += gencode_flags() if kind == "cuda" else []
    tail = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
    return cache_dir() / f"{kind}-{source_hash(kind)}-{tail}.so"


def build_into_package(kind: str, folder: Path) -> Path:
    """Compile a kind into a package folder, as `_<kind>-<source hash>.so`; older ones are removed.

    Raises:
        BuildError: as `build_to`; the message is also kept in `_<kind>.log` there.
    """
    log = folder / f"_{kind}.log"
    target = folder / f"_{kind}-{source_hash(kind)}.so"
    with _failure_kept_in(log):
        if not target.exists():
            build_to(kind, target)
    for old in folder.glob(f"_{kind}-*.so"):
        if old != target:
            old.unlink()
    return target


@contextmanager
def _failure_kept_in(log: Path) -> Iterator[None]:
    """Write the message of a BuildError to `log`, where `sparse_attn.library` finds it; remove an old one."""
    log.unlink(missing_ok=True)
    try:
        yield
    except BuildError as error:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"{error}\n")
        raise


def failure_logs(kind: str) -> list[Path]:
    """Where the last failed build of a kind left its message: the user's cache, the package."""
    return [path for path in (cache_dir() / f"{kind}.log", PACKAGE / f"_{kind}.log") if path.exists()]


def _wants_cuda() -> bool:
    """Whether CUDA code is of use: there is an NVIDIA GPU, or an architecture was asked for."""
    return GPU_DEVICE.exists() or bool(os.environ.get("TORCH_CUDA_ARCH_LIST"))


def wanted_kinds(request: str | None = None) -> list[str]:
    """The kinds to build: of `request`, else of SPARSE_ATTN_BUILD, else what this machine can use.

    Raises:
        BuildError: an unknown word.
    """
    request = request or os.environ.get("SPARSE_ATTN_BUILD") or "auto"
    if request == "auto":
        return ["cpu"] + (["cuda"] if source_files("cuda") and nvcc() and _wants_cuda() else [])
    if request == "none":
        return []
    if request not in KINDS:
        raise BuildError(f"SPARSE_ATTN_BUILD is {request!r}; it must be auto, cpu, cuda or none.")
    return [request]


# -- command line --------------------------------------------------------------------------------------


def build_command(kind: str = "", force: bool = False) -> None:
    """Compile the C++ (and CUDA) engines into the user's cache. --kind: auto, cpu, cuda or none."""
    try:
        kinds = wanted_kinds(kind)
        if kinds == []:
            print("nothing to build: SPARSE_ATTN_BUILD=none")
        for each in kinds:
            if not source_files(each):
                print(f"{each}: no {'CUDA' if each == 'cuda' else 'C++'} sources; nothing to build.")
                continue
            with _failure_kept_in(cache_dir() / f"{each}.log"):
                target = cached_path(each)
            if target.exists() and not force:
                print(f"{each}: up to date: {target}")
                continue
            print(f"{each}: compiling on {max_jobs()} processes ...", flush=True)
            with _failure_kept_in(cache_dir() / f"{each}.log"):
                print(f"{each}: built {build_to(each, target)}")
    except BuildError as error:
        print(f"sparse-attn build: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def compile_cuda_only() -> None:
    """Compile every CUDA source and throw the result away: a check that needs nvcc but no GPU.

    Raises:
        BuildError: as `compile_all`, or ptxas says that registers spill or that it puts the matrix
            instructions of a kernel one after another, which it takes for a remark.
    """
    if not source_files("cuda"):
        print("cuda: no CUDA sources; nothing to compile.")
        return
    with tempfile.TemporaryDirectory(prefix="sparse_attn_cuda_") as folder:
        steps = cuda_steps(Path(folder))
        steps = [Step(step.target, (*step.command, "-Xptxas=-warn-spills")) for step in steps]
        output = compile_all(steps)
        print(output)
        slow = [line for line in output.splitlines() if "serialized" in line or "spilled" in line]
        if slow:
            raise BuildError("cuda: compiled, but not to run at full speed:\n" + "\n".join(slow))
        print(f"cuda: compiled {len(steps)} files for {os.environ.get('TORCH_CUDA_ARCH_LIST', '9.0a')}")


def main(arguments: list[str]) -> None:
    if arguments == ["--compile-cuda-only"]:
        try:
            compile_cuda_only()
        except BuildError as error:
            print(error, file=sys.stderr)
            raise SystemExit(1) from error
    else:
        kinds = [word for word in arguments if not word.startswith("--")]
        build_command(kinds[0] if kinds else "", "--force" in arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
