"""Finding and loading the compiled libraries (built by `sparse_attn.build`)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from sparse_attn import build

_REMEDY = "run `sparse-attn build`"


def packaged_path(kind: str) -> Path:
    """Where an install puts the library of these sources; without sources, the one that was shipped."""
    sources = build.source_hash(kind)
    shipped = [] if sources else sorted(build.PACKAGE.glob(f"_{kind}-*.so"))
    return shipped[0] if shipped else build.PACKAGE / f"_{kind}-{sources}.so"


def find(kind: str) -> Path | str:
    """The library of a kind, or why there is none.

    The user's cache is asked first, then the package. Where the sources lie beside the package, a library
    built from other sources is not taken.
    """
    sources, packaged = build.source_hash(kind), packaged_path(kind)
    cached = build.cache_dir().glob(f"{kind}-{sources}-*.so") if sources else ()
    newest_first = sorted(cached, key=lambda path: path.stat().st_mtime, reverse=True)
    if newest_first or packaged.exists():
        return newest_first[0] if newest_first else packaged
    if not sources:
        return f"its {kind} library is not built, and its sources are not here; reinstall sparse-attn."
    logs = build.failure_logs(kind)
    if logs:
        last = logs[0].read_text().strip()
        return f"building its {kind} library failed: {last}\n(kept in {logs[0]}; mend it, then {_REMEDY})."
    others = [*build.cache_dir().glob(f"{kind}-*.so"), *build.PACKAGE.glob(f"_{kind}-*.so")]
    state = "was built from other sources" if others else "is not built"
    return f"its {kind} library {state}; {_REMEDY}."


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
    except (OSError, RuntimeError) as error:
        words = error.__cause__ or error  # torch's message leaves out the loader's
        return f"its {kind} library {path} does not load ({words}); {_REMEDY} --force."
    return None
