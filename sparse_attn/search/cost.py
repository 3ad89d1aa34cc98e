"""What a head costs: the paper's proxy, or microseconds out of a table measured on the device.

A table holds microseconds a tile by kernel ("blocks": tiles attended; "skipped": tiles that BLASST's rule
drops; "columns": a query block against 64 single keys), head size, dtype, tile and density, the time that
methods take to select, and what a call and a copy cost. `cost_measure.py` makes one.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_attn.search.measure import Scores

SHIPPED = Path(__file__).with_name("cost_tables")
TABLE_VERSION = 1
COLUMNS = 64  # single keys in a "columns" tile
BY_SHAPE = frozenset(("dense", "s2", "blasst", "vdit"))  # methods whose selection reads no queries or keys


@dataclass(frozen=True)
class TileRow:
    """Microseconds of one tile.

    Attributes:
        kernel: "blocks", "skipped" or "columns".
        head_dim, dtype, block_m, block_n: what was measured; block_n of columns is 64.
        density: share of the visible pairs attended in that measurement.
        us: microseconds a tile, all threads of the table working.
    """

    kernel: str
    head_dim: int
    dtype: str
    block_m: int
    block_n: int
    density: float
    us: float


@dataclass(frozen=True)
class SelectRow:
    """Microseconds that a selection takes.

    Attributes:
        key: `select_key` of the method and its settings.
        head_dim, length: what was measured.
        us: a query head. call_us: a call, however many heads it has.
    """

    key: str
    head_dim: int
    length: int
    us: float
    call_us: float


@dataclass(frozen=True, eq=False)
class CostTable:
    """Times of one device.

    Attributes:
        device: as `device_name()` says it.
        threads: that did the work (CPU).
        tiles, select: the rows.
        call_us: what one more call of `attend` costs beside its tiles.
        copy_us_per_mib: copying heads in and out of calls.
        made: where and with what, for people.
    """

    device: str
    threads: int
    tiles: tuple[TileRow, ...]
    select: tuple[SelectRow, ...]
    call_us: float
    copy_us_per_mib: float
    made: dict[str, Any]

    @property
    def device_type(self) -> str:
        return "cuda" if self.made.get("device_type") == "cuda" else "cpu"

    # -- times ------------------------------------------------------------------------------------

    def head_us(self, scores: Scores, head_dim: int, dtype: str) -> list[float]:
        """Predicted microseconds of each head for what `measure.score` counted; without selection."""
        times = []
        for n in range(len(scores["visited"])):
            m, width = int(scores["block_m"][n]), int(scores["block_n"][n])
            density = scores["pairs"][n] / max(scores["visible"][n], 1)
            visited, kept = scores["visited"][n], scores["kept"][n]
            time = kept * self.tile_us("blocks", head_dim, dtype, m, width, kept_density(scores, n))
            if scores["skips"][n]:
                time += (visited - kept) * self.tile_us("skipped", head_dim, dtype, m, width, density)
            if scores["columns"][n]:
                per_tile = self.tile_us("columns", head_dim, dtype, m, COLUMNS, density)
                time += scores["columns"][n] / COLUMNS * per_tile
            times.append(time)
        return times

    def tile_us(
        self, kernel: str, head_dim: int, dtype: str, block_m: int, block_n: int, density: float
    ) -> float:
        """Microseconds of a tile: the nearest measured tile and head size, scaled by the work, and between
        measured densities by the logarithm of the density.

        Raises:
            ValueError: the table has no row for this kernel and dtype.
        """
        curve, factor = self._curve(kernel, head_dim, dtype, block_m, block_n)
        at = math.log(min(max(density, curve[0][0]), curve[-1][0]))
        for (d0, us0), (d1, us1) in pairwise(curve):
            if at <= math.log(d1):
                share = (at - math.log(d0)) / (math.log(d1) - math.log(d0))
                return factor * (us0 + share * (us1 - us0))
        return factor * curve[-1][1]

    def _curve(
        self, kernel: str, head_dim: int, dtype: str, block_m: int, block_n: int
    ) -> tuple[list[tuple[float, float]], float]:
        rows = [r for r in self.tiles if r.kernel == kernel and r.dtype == dtype]
        if not rows:
            raise ValueError(
                f"search: the cost table of {self.device} has no row for kernel {kernel!r} in {dtype}; "
                "measure one with `sparse-attn bench --cost-table FILE`."
            )

        def distance(r: TileRow) -> float:
            tile = abs(math.log(r.block_m / block_m)) + abs(math.log(r.block_n / block_n))
            return 10 * abs(math.log(r.head_dim / head_dim)) + tile

        best = min(rows, key=distance)
        same = ("head_dim", "block_m", "block_n")
        curve = sorted(
            (r.density, r.us) for r in rows if all(getattr(r, x) == getattr(best, x) for x in same)
        )
        work = block_m * block_n * head_dim / (best.block_m * best.block_n * best.head_dim)
        return curve, work

    def select_us(self, key: str, head_dim: int, length: int) -> tuple[float, float] | None:
        """Microseconds of a selection, a head and a call, between or beyond measured lengths by a power
        law, in proportion to the head size; 0 for methods that look their layouts up by shape; None where
        none was measured."""
        if key.split()[0] in BY_SHAPE:
            return 0.0, 0.0
        rows = [r for r in self.select if r.key == key]
        if not rows:
            return None
        dim = min((r.head_dim for r in rows), key=lambda d: abs(math.log(d / head_dim)))
        rows = sorted((r for r in rows if r.head_dim == dim), key=lambda r: r.length)
        curves = [[(r.length, r.us) for r in rows], [(r.length, r.call_us) for r in rows]]
        head, call = (head_dim / dim * _power_law(x, length) for x in curves)
        return head, call

    # -- files ------------------------------------------------------------------------------------

    def to_json(self) -> str:
        plain = {"version": TABLE_VERSION, **{k: v for k, v in asdict(self).items() if k not in _LISTS}}
        head = json.dumps(plain, indent=1)[:-2]
        lists = [
            f' "{name}": [\n  ' + ",\n  ".join(json.dumps(asdict(r)) for r in getattr(self, name)) + "\n ]"
            for name in _LISTS
        ]
        return f"{head},\n" + ",\n".join(lists) + "\n}\n"

    @classmethod
    def load(cls, path: str | Path) -> CostTable:
        """Read a table.

        Raises:
            ValueError: no such file, not a table, or one of another version.
        """
        try:
            plain = json.loads(Path(path).read_text(encoding="utf-8"))
            if plain.pop("version") != TABLE_VERSION:
                raise ValueError(f"its version is not {TABLE_VERSION}")
            plain["tiles"] = tuple(TileRow(**r) for r in plain["tiles"])
            plain["select"] = tuple(SelectRow(**r) for r in plain["select"])
            return cls(**plain)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"search: {path} is not a cost table: {error}") from None


_LISTS = ("tiles", "select")


def _power_law(points: list[tuple[int, float]], length: int) -> float:
    """The value at a length, between or beyond (length, value) points, in ascending order."""
    if len(points) == 1:
        return points[0][1] * length / points[0][0]
    after = next((n for n, (x, _) in enumerate(points) if x >= length), len(points) - 1)
    (x0, low), (x1, high) = points[max(after - 1, 0)], points[max(after, 1)]
    power = math.log(max(high, 1e-3) / max(low, 1e-3)) / math.log(x1 / x0)
    return low * (length / x0) ** power


def kept_density(scores: Scores, n: int) -> float:
    """The density to look a tile up with. Under a skip rule the tiles that are read set the pace."""
    if scores["skips"][n]:
        return 1.0
    return scores["pairs"][n] / max(scores["visible"][n], 1)


@lru_cache(maxsize=8)
def shipped_table(device_type: str) -> CostTable:
    """The table of this machine's device, or of the nearest one that ships with the package.

    Raises:
        ValueError: none ships for this kind of device.
    """
    tables = [CostTable.load(path) for path in sorted(SHIPPED.glob(f"{device_type}-*.json"))]
    if not tables:
        raise ValueError(
            f"search: no cost table ships for {device_type}; measure one with "
            "`sparse-attn bench --cost-table FILE` and pass it with --cost-table."
        )
    name = device_name(device_type)
    return next((t for t in tables if t.device == name), tables[0])


def device_name(device_type: str) -> str:
    """What a table's times depend on, as text."""
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    from sparse_attn.bench.run import cpu_name
    from sparse_attn.engines.cpu import CpuEngine

    return f"{cpu_name()} {CpuEngine().instruction_set()}".strip()


def select_key(method: str, config: Any) -> str:
    """Settings that the time of a selection depends on: the method, its whole numbers, and which of its
    optional fractions are given (AnchorAttention's `recall` asks for passes of its own)."""
    parts = []
    for f in fields(config):
        value = getattr(config, f.name) if f.init else None
        if isinstance(value, int) and not (isinstance(value, bool) and not value):
            parts.append(f"{f.name}={value}")
        elif isinstance(value, float) and f.default is None:
            parts.append(f.name)
    return " ".join([method, *parts])


def paper_loss(mse: np.ndarray, density: np.ndarray, penalty: float) -> np.ndarray:
    """Eq. 2 of Sparse-vDiT (arXiv 2506.03065): L_i = MSE(O_i, O_0) + lambda * (1 - S_i), with S_i the
    sparsity of mode i. (Algorithm 1 of its appendix has lambda * S_i, which would reward density; the text,
    Fig. 5 and Eq. 2 agree with each other.)"""
    return mse + penalty * density
