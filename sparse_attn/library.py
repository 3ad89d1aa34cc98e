"""Finding and loading the compiled libraries (built by `sparse_attn.build`)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from sparse_attn import build

_REMEDY = "run `sparse-attn build`"


def packaged_path(kind: str) -> Path:
    """Where an install puts a library."""
    return build.PACKAGE / f"_{kind}.so"


def stamp_path(library: Path) -> Path:
    """A text file beside an installed library: the hash of the sources that it was built from."""
    return library.with_suffix(".sources")


def find(kind: str) -> Path | str:
    """The library of a kind, or why there is none.

    The user's cache is asked first, then the package. A library built from other sources than those
    beside the package is not taken.
    """
    sources = build.source_hash(kind)
    cached = sorted(build.cache_dir().glob(f"{kind}-{sources}-*.so"), key=lambda path: path.stat().st_mtime)
    if sources and cached:
        return cached[-1]
    packaged = packaged_path(kind)
    if not packaged.exists():
        return f"its {kind} library is not built; {_REMEDY}."
    stamp = stamp_path(packaged)
    built_from = stamp.read_text().strip() if stamp.exists() else ""
    if sources and built_from != sources:
        return f"its {kind} library was built from other sources; {_REMEDY}."
    return packaged


@cache
def load(kind: str) -> str | None:
    """Load a library once. None if it is loaded now, else the reason why not, with its remedy."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < build.MIN_TORCH:
        return f"it needs torch 2.11 or newer; this is {torch.__version__}. Upgrade torch."
    path = find(kind)
    if isinstance(path, str):
        return path
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"its {kind} library {path} does not load ({error}); {_REMEDY} --force."
    return None
