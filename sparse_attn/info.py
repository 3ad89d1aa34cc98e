"""`sparse-attn info`: what is installed, which engines are on, and what each can run.

Works with nothing built, no GPU and no Triton: that is when one needs it. Also
`python -m sparse_attn.info [--json]`, which needs neither typer nor rich.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from sparse_attn import build, kernel_resources, library
from sparse_attn.engines import ENGINES, AttendCall
from sparse_attn.layout import SparseLayout
from sparse_attn.version import __version__

PACKAGES = ("torch", "triton", "numpy", "transformers", "diffusers", "gguf", "matplotlib", "rich", "typer")

# What each variable changes; only those that are set are shown, and any other SPARSE_ATTN_*.
VARIABLES = {
    "SPARSE_ATTN_ENGINE": "engine that every call insists on",
    "SPARSE_ATTN_CPU_ISA": "instruction set of the cpu engine",
    "SPARSE_ATTN_DEBUG": "checks that synchronise with the device",
    "SPARSE_ATTN_BUILD": "what is compiled: auto, cpu, cuda or none",
    "SPARSE_ATTN_CACHE": "where compiled libraries are kept",
    "TRITON_INTERPRET": "Triton kernels run as Python on CPU tensors",
    "TORCH_CUDA_ARCH_LIST": "GPU architectures to compile for",
    "CUDA_HOME": "CUDA toolkit to compile with",
    "CUDA_VISIBLE_DEVICES": "GPUs that are seen",
    "MAX_JOBS": "compiler processes",
    "CXX": "C++ compiler",
    "OMP_NUM_THREADS": "threads of CPU kernels",
}


@dataclass(frozen=True)
class Need:
    """What a method asks of an engine.

    Attributes:
        columns: its layouts have column lists.
        skip: it uses the in-kernel skip.
        is_causal: it is made for causal attention.
        block: query and key block size of its default configuration.
    """

    columns: bool = False
    skip: bool = False
    is_causal: bool = True
    block: int = 128


NEEDS = {
    "sparse_attention": Need(),
    "blasst": Need(skip=True),
    "anchor": Need(columns=True),
    "s2": Need(block=64),
    "sparsed": Need(is_causal=False),
    "vdit": Need(columns=True, is_causal=False),
}

_LENGTH, _HEAD_DIM = 320, 64  # of the calls that engines are asked about; nothing is computed


def collect() -> dict[str, Any]:
    """Everything `info` prints, as plain data."""
    return {
        "sparse_attn": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "built": _built(),
        "kernels": kernel_resources.of_library("cuda"),
        "engines": {name: engine.why_off() for name, engine in ENGINES.items()},
        "methods": method_table(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name in VARIABLES or name.startswith("SPARSE_ATTN_")
        },
    }


def _version(name: str) -> str | None:
    if name == "torch":
        return torch.__version__  # it names the build (+cu130, +cpu), which the package's version may not
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    cpu = {"device": "cpu", "name": platform.processor() or platform.machine()}
    found: list[dict[str, Any]] = [cpu | {"threads": torch.get_num_threads()}]
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            found.append(
                {
                    "device": f"cuda:{number}",
                    "name": card.name,
                    "capability": f"{card.major}.{card.minor}",
                    "memory_gib": round(card.total_memory / 2**30, 1),
                    "multiprocessors": card.multi_processor_count,
                    "cuda": torch.version.cuda,
                }
            )
    return found


def _built() -> dict[str, dict[str, str | None]]:
    """Of each kind of compiled library: its path, or the reason why there is none."""
    found: dict[str, dict[str, str | None]] = {}
    for kind in build.KINDS:
        if not build.source_files(kind) and not library.packaged_path(kind).exists():
            found[kind] = {"path": None, "reason": "this version has no sources of it."}
            continue
        place = library.find(kind)
        found[kind] = (
            {"path": None, "reason": place}
            if isinstance(place, str)
            else {"path": str(place), "reason": library.load(kind)}
        )
    return found


# -- methods x engines ----------------------------------------------------------------------------


def method_table(devices: list[str] | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """method -> engine -> {"forward", "backward": the devices where it runs, "why_not": reasons}.

    Asked of `why_not` with a call such as the method makes, in float16 on CUDA and float32 on CPU.

    Args:
        devices: default: "cpu", and "cuda" where there is one.
    """
    if devices is None:
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for method, need in NEEDS.items():
        table[method] = {}
        for name, engine in ENGINES.items():
            cell: dict[str, Any] = {"forward": [], "backward": [], "why_not": []}
            for device in devices:
                for step, needs_grad in (("forward", False), ("backward", True)):
                    reasons = engine.why_not(representative_call(need, device, needs_grad))
                    if not reasons:
                        cell[step].append(device)
                    cell["why_not"] += [r for r in reasons if r not in cell["why_not"]]
            table[method][name] = cell
    return table


def representative_call(need: Need, device: str, needs_grad: bool) -> AttendCall:
    """A small call with the features that `need` names. Grouped-query, as most models are."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    L, block = _LENGTH, need.block
    num_blocks = -(-L // block)
    mask = torch.eye(num_blocks, dtype=torch.bool, device=device)[None, None]
    columns = None
    if need.columns:
        columns = torch.zeros(1, 1, num_blocks, L, dtype=torch.bool, device=device)
        columns[..., 1:, 0] = True
    layout = SparseLayout.from_dense_mask(mask, block_m=block, block_n=block, L=L, S=L, columns=columns)
    q = torch.empty(1, 2, L, _HEAD_DIM, dtype=dtype, device=device)
    k = torch.empty(1, 1, L, _HEAD_DIM, dtype=dtype, device=device)
    skip = torch.zeros(1, 2, dtype=torch.float32, device=device) if need.skip else None
    return AttendCall(
        q, k, k, layout, skip, need.is_causal, _HEAD_DIM**-0.5,
        want_kept=need.skip and needs_grad, needs_grad=needs_grad,
    )  # fmt: skip


def cell_text(cell: dict[str, Any]) -> str:
    """A cell of the table in a few words, such as "forward and backward (cuda)"; "-" for nothing."""
    forward, backward = cell["forward"], cell["backward"]
    if not forward:
        return "-"
    if forward == backward:
        return f"forward and backward ({', '.join(forward)})"
    text = f"forward ({', '.join(forward)})"
    return text + (f", backward ({', '.join(backward)})" if backward else "")


def markdown_table(table: dict[str, dict[str, dict[str, Any]]] | None = None) -> str:
    """Methods x engines for a README; of this machine."""
    table = method_table() if table is None else table
    lines = ["| method | " + " | ".join(ENGINES) + " |", "|---" * (len(ENGINES) + 1) + "|"]
    for method, row in table.items():
        lines.append(f"| {method} | " + " | ".join(cell_text(cell) for cell in row.values()) + " |")
    return "\n".join(lines)


# -- printing -------------------------------------------------------------------------------------


def render(facts: dict[str, Any]) -> str:
    """The facts of `collect` as text."""
    parts = [_head(facts), _engines(facts), _methods(facts)]
    if facts["built"].get("cuda", {}).get("path"):
        parts.append(kernel_resources.render(facts["kernels"]))
    if facts["environment"]:
        lines = [
            f"  {name}={value}" + (f"  ({VARIABLES[name]})" if name in VARIABLES else "")
            for name, value in facts["environment"].items()
        ]
        parts.append("\n".join(["Environment variables in force", *lines]))
    return "\n\n".join(parts)


def _head(facts: dict[str, Any]) -> str:
    lines = [f"sparse_attn {facts['sparse_attn']}, Python {facts['python']}, {facts['platform']}"]
    present = [f"{name} {version}" for name, version in facts["packages"].items() if version]
    absent = [name for name, version in facts["packages"].items() if not version]
    lines.append("  installed: " + ", ".join(present))
    if absent:
        lines.append("  not installed: " + ", ".join(absent))
    for card in facts["devices"]:
        extra = ", ".join(f"{k} {v}" for k, v in card.items() if k not in ("device", "name"))
        lines.append(f"  {card['device']}: {card['name']} ({extra})")
    if len(facts["devices"]) == 1:
        lines.append("  no CUDA device is seen by torch")
    return "\n".join(lines)


def _engines(facts: dict[str, Any]) -> str:
    lines = ["Compiled libraries"]
    for kind, place in facts["built"].items():
        where = place["path"] or "none"
        lines.append(f"  {kind}: {where}" + (f" ({place['reason']})" if place["reason"] else ""))
    lines += ["", "Engines, in priority order"]
    for name, reasons in facts["engines"].items():
        lines.append(f"  {name}: " + ("on" if not reasons else "off: " + "; ".join(reasons)))
    return "\n".join(lines)


def _methods(facts: dict[str, Any]) -> str:
    table = facts["methods"]
    header = ["method", *facts["engines"]]
    cells = [[method, *(cell_text(cell) for cell in row.values())] for method, row in table.items()]
    widths = [max(len(x) for x in column) for column in zip(header, *cells, strict=True)]
    lines = ["Methods and the engines that run them"]
    for line in [header, *cells]:
        lines.append("  " + "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip())
    off = {name for name, reasons in facts["engines"].items() if reasons}
    notes: dict[str, list[str]] = {}
    for method, row in table.items():
        for name, cell in row.items():
            for reason in cell["why_not"] if name not in off else []:
                notes.setdefault(f"{name}: {reason}", []).append(method)
    lines += [f"  {note} [{', '.join(methods)}]" for note, methods in notes.items()]
    return "\n".join(lines)


def info_command(json: bool = False) -> None:
    """Say what is installed, which engines are on and why not, and what each can run."""
    _print(json)


def _print(as_json: bool, write: Callable[[str], None] = print) -> None:
    facts = collect()
    write(json.dumps(facts, indent=2) if as_json else render(facts))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sparse_attn.info", description=info_command.__doc__)
    parser.add_argument("--json", action="store_true", help="print plain data")
    _print(parser.parse_args().json)


if __name__ == "__main__":
    main()
