"""What the compiled CUDA kernels ask of a multiprocessor: registers, shared memory, stack.

Read from the library with cuobjdump, which comes with the CUDA toolkit and inside Triton; no GPU is needed.
Shared memory that is asked for at launch does not stand in a library: that is in csrc/hopper/config.h.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparse_attn import library

_REMEDY = "install the CUDA toolkit or Triton, or set CUDA_HOME"


@dataclass(frozen=True)
class KernelResources:
    """One kernel of a library.

    Attributes:
        name: demangled where c++filt is found, without its arguments.
        arch: such as "sm_90a".
        registers: for each thread, as compiled; warp-specialised kernels move some between warps.
        shared_bytes: static; what is asked for at launch comes on top.
        stack_bytes: for each thread, in local memory; above 0 means arrays there, or spilled registers.
    """

    name: str
    arch: str
    registers: int
    shared_bytes: int
    stack_bytes: int


def of_library(kind: str) -> list[dict[str, Any]] | str:
    """The kernels of a compiled library as plain data, or why they are not known."""
    path = library.find(kind)
    if isinstance(path, str):
        return path
    tool = cuobjdump()
    if tool is None:
        return f"no cuobjdump to read them from {path}; {_REMEDY}."
    try:
        done = subprocess.run(
            [tool, "-res-usage", str(path)], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"{tool} failed on {path}: {error}"
    return [asdict(kernel) for kernel in parse(_demangled(done.stdout))]


def cuobjdump() -> str | None:
    """The program, from CUDA_HOME, PATH or the Triton package."""
    home = os.environ.get("CUDA_HOME")
    folders = [str(Path(home) / "bin")] if home else []
    folders += [os.environ.get("PATH", "")]
    spec = importlib.util.find_spec("triton")  # looked for, not imported
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folders.append(str(Path(place) / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def parse(text: str) -> list[KernelResources]:
    """What `cuobjdump -res-usage` printed, in its order."""
    kernels, arch, name = [], "", ""
    for line in text.splitlines():
        if found := re.match(r"arch = (\S+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (.+):$", line):
            name = _short(found[1])
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = (int(x) for x in found.groups())
            kernels.append(KernelResources(name, arch, registers, shared, stack))
    return kernels


def _short(name: str) -> str:
    """A demangled name without its namespaces, return type and arguments."""
    name = re.sub(r"\b(?:sparse_attn|hopper)::", "", name.removeprefix("void "))
    return re.sub(r"\((?!.*>).*\)$", "", name).replace(" >", ">")


def _demangled(text: str) -> str:
    tool = shutil.which("c++filt")
    if tool is None:
        return text
    done = subprocess.run([tool], input=text, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout if done.returncode == 0 else text


def render(kernels: list[dict[str, Any]] | str) -> str:
    """A table as text: kernels of the same needs share a line."""
    title = "CUDA kernels: registers a thread, static shared memory, stack a thread"
    if isinstance(kernels, str):
        return f"{title}\n  not known: {kernels}"
    groups: dict[tuple[Any, ...], list[str]] = {}
    for kernel in kernels:
        needs = tuple(kernel[key] for key in ("arch", "registers", "shared_bytes", "stack_bytes"))
        groups.setdefault(needs, []).append(kernel["name"])
    lines = [title]
    for (arch, registers, shared, stack), names in groups.items():
        lines.append(f"  {arch}: {registers} registers, {shared} bytes shared, {stack} bytes stack")
        lines += [f"    {name}" for name in names]
    return "\n".join(lines)
