"""Grids of numbers as PNG data addresses, with nothing but the standard library."""

from __future__ import annotations

import base64
import struct
import zlib

import torch
from torch import Tensor

# Attention mass of a cell, on a logarithmic scale: white below, full colour above.
LOWEST, HIGHEST = 1e-4, 10**-0.5
WHITE, HIDDEN = (255, 255, 255), (236, 238, 241)
ATTENDED, KEPT, MISSED = (214, 228, 244), (8, 48, 107), (200, 30, 20)


def attention_png(truth: Tensor, visible: Tensor) -> str:
    """Dense attention: the more mass, the darker blue. truth, visible: [rows, cols]."""
    return _data_address(_blend(_ground(visible), KEPT, _strength(truth)))


def pattern_png(truth: Tensor, kept: Tensor, attended: Tensor, visible: Tensor) -> str:
    """A pattern over the attention: attended cells light blue, the mass they hold dark blue, the mass
    that was missed red."""
    image = _blend(_ground(visible), ATTENDED, attended.sqrt())  # sqrt: one key among many still shows
    image = _blend(image, KEPT, _strength(kept))
    return _data_address(_blend(image, MISSED, _strength((truth - kept).clamp(min=0))))


def _ground(visible: Tensor) -> Tensor:
    """float32 [rows, cols, 3]"""
    return torch.where(visible[..., None], torch.tensor(WHITE), torch.tensor(HIDDEN)).float()


def _strength(mass: Tensor) -> Tensor:
    span = torch.tensor(HIGHEST / LOWEST).log()
    return ((mass.clamp(min=LOWEST) / LOWEST).log() / span).clamp(0, 1)


def _blend(image: Tensor, colour: tuple[int, int, int], strength: Tensor) -> Tensor:
    return image + strength[..., None] * (torch.tensor(colour) - image)


def _data_address(image: Tensor) -> str:
    """float32 [rows, cols, 3] in 0 .. 255 -> "data:image/png;base64,..." """
    pixels = image.round().to(torch.uint8)
    rows, cols, _ = pixels.shape
    filtered = torch.cat([torch.zeros(rows, 1, dtype=torch.uint8), pixels.reshape(rows, -1)], 1)
    body = zlib.compress(filtered.numpy().tobytes(), 9)
    header = struct.pack(">IIBBBBB", cols, rows, 8, 2, 0, 0, 0)  # 8 bits, RGB
    parts = [_chunk(b"IHDR", header), _chunk(b"IDAT", body), _chunk(b"IEND", b"")]
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
