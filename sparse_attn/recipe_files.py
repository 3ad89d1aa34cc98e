"""The files of a recipe: written whole or not at all, tensors checked against their hash."""

from __future__ import annotations

import hashlib
import importlib
import os
from pathlib import Path
from typing import Any

from torch import Tensor


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or an interruption, never sees half of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write a safetensors file; returns the recipe's "tensors" entry."""
    # Layers may share a tensor; the format wants each name to own its memory.
    data = _safetensors().save({name: x.clone() for name, x in tensors.items()})
    write_whole(path, data)
    return {"file": path.name, "hash": _hash(data)}


def load_tensors(entry: Any, folder: Path) -> dict[str, Tensor]:
    """The tensors of a "tensors" entry that the schema has found good.

    Raises:
        ValueError: the file is missing, or is another one.
    """
    path = folder / entry["file"]
    if not path.is_file():
        raise ValueError(f"tensors.file: {path} is missing; keep it beside the recipe")
    data = path.read_bytes()
    if _hash(data) != entry["hash"]:
        raise ValueError(f"tensors.hash: {path} is not the file that the recipe was saved with")
    return _safetensors().load(data)


def _hash(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError:
        raise ValueError("tensors: this recipe holds tensors; pip install safetensors") from None
