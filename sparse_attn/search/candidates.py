"""What a search may choose from: methods with a small grid of settings each, and the user's own.

A method that joins the registry takes part by itself: with what its config class's `search_grid(shape)`
gives, or with its default settings where it has none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_attn.methods import METHODS
from sparse_attn.methods.anchor import AnchorConfig
from sparse_attn.methods.base import Method
from sparse_attn.methods.blasst import BlasstConfig
from sparse_attn.methods.s2 import NO_SHARD, S2Config
from sparse_attn.methods.sparsed_layout import SparseDConfig
from sparse_attn.methods.vdit import VDiTConfig
from sparse_attn.recipe_check import DenseConfig, decode_config, encode_config, methods


@dataclass(frozen=True)
class Shape:
    """What a grid may depend on.

    Attributes:
        length: tokens of the calibration sequences.
        num_heads, num_kv_heads, head_dim: of a layer.
        is_causal: whether attention is causal.
        video: (frames, height, width, text tokens, whether the text comes first), or None.
        device: "cuda" for blocks that the engines for GPUs are fast at: of 64 and 128, and a BLASST skip on
            64x128; "cpu" for those of the CPU's.
    """

    length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    is_causal: bool = True
    video: tuple[int, int, int, int, bool] | None = None
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to run a head.

    Attributes:
        label: short, for people; unique in a search.
        method: a name of `sparse_attn.recipe_check.methods()`.
        config: an instance of the method's config class, the same for all heads.
        plain: method and config as JSON: what tells candidates apart.
    """

    label: str
    method: str
    config: Any
    plain: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        tensors: dict[str, Tensor] = {}
        plain = encode_config(self.config, tensors, "")
        if tensors or isinstance(plain.get("patterns"), list):
            raise ValueError(
                f"search: candidate {self.label!r} has settings by head; a candidate is tried on every head, "
                "so give it one number (or pattern) for all."
            )
        object.__setattr__(self, "plain", {"method": self.method, "config": plain})

    @property
    def info(self) -> Method:
        return methods()[self.method]


def default_candidates(shape: Shape, only: Sequence[str] | None = None) -> list[Candidate]:
    """Dense attention first, then windows with a sink, then every method of the registry that fits.

    Args:
        only: names to keep, of the registry or "window"; "dense" is always there.

    Raises:
        ValueError: an unknown name.
    """
    known = ["window", *METHODS]
    unknown = [name for name in only or () if name not in [*known, "dense"]]
    if unknown:
        raise ValueError(f"search: unknown method {unknown[0]!r}; choose from {', '.join(known)}.")
    found = [Candidate("dense", "dense", DenseConfig())]
    for name in known:
        if only is None or name in only:
            found += windows(shape) if name == "window" else _of_method(name, shape)
    return distinct(found)


def distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Without repetitions of the same settings; labels made unique by a number."""
    seen: dict[str, Candidate] = {}
    labels: dict[str, int] = {}
    for c in candidates:
        key = json.dumps(c.plain, sort_keys=True)
        if key in seen:
            continue
        labels[c.label] = labels.get(c.label, 0) + 1
        label = c.label if labels[c.label] == 1 else f"{c.label} #{labels[c.label]}"
        seen[key] = Candidate(label, c.method, c.config)
    return list(seen.values())


def load_candidates(path: str | Path) -> list[Candidate]:
    """The user's own, from a JSON file: a list of {"method", "config", "label" (optional)}.

    Raises:
        ValueError: not such a list; a bad setting, with its place.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"search: {path}: {error}") from None
    if not isinstance(entries, list):
        raise ValueError(f"search: {path} must hold a JSON list of candidates.")
    found, problems = [], []
    for n, entry in enumerate(entries):
        place = f"[{n}]"
        if not isinstance(entry, Mapping) or entry.get("method") not in methods():
            problems.append(f"{place}.method: choose one of {', '.join(methods())}")
            continue
        config, wrong = decode_config(entry["method"], entry.get("config", {}), {}, f"{place}.config")
        problems += wrong
        if not wrong:
            found.append(Candidate(str(entry.get("label", entry["method"])), entry["method"], config))
    if problems:
        raise ValueError(f"search: {path}:\n  " + "\n  ".join(problems))
    return found


# -- grids --------------------------------------------------------------------------------------------


def windows(shape: Shape) -> list[Candidate]:
    """The nearest `window` keys and the first `sink` ones, as S2 without a shard."""
    sizes = [(16, 32, 16), (16, 64, 16), (32, 96, 32), (32, 128, 32)]
    if shape.device == "cuda":
        sizes = [(64, 64, 64), (64, 128, 64)]
    sizes += [
        (64, 192, 64), (64, 256, 64), (64, 384, 64), (64, 512, 64), (64, 768, 64), (64, 1024, 64),
        (64, 1536, 64), (128, 2048, 128),
    ]  # fmt: skip
    found = []
    for size, window, sink in sizes:
        if window <= shape.length // 2:
            config = S2Config(
                block_size=size, local_blocks=window // size + 1, vert_stride=NO_SHARD,
                sink_blocks=sink // size, head_shift=0,
            )  # fmt: skip
            found.append(Candidate(f"window {window}+{sink}", "s2", config))
    return found


def _anchor(shape: Shape) -> list[Candidate]:
    if not shape.is_causal:
        return []
    grid = [(4, theta) for theta in (3.0, 5.0, 7.0, 9.0)] + [(8, theta) for theta in (5.0, 9.0)]
    size = 128 if shape.device == "cuda" else 64
    found = [
        Candidate(f"anchor {theta:g} step {step}", "anchor", AnchorConfig(theta, size, step))
        for step, theta in grid
        if step * size <= shape.length // 2
    ]
    if shape.device == "cpu" and size <= shape.length // 2:
        # One query speaks for its block: a key is read whose share of that query's mass is above exp(-theta).
        # On a CPU this selects in a third of the time that the mean queries take.
        for theta in (7.0, 9.0):
            config = AnchorConfig(theta, size, step=1, reference="all", samples=1)
            found.append(Candidate(f"anchor {theta:g} of one query", "anchor", config))
        # Two queries, and the share of their mass that lists must keep: on the frontier better than a theta.
        for recall in (0.95, 0.98):
            config = AnchorConfig(12.0, size, step=1, samples=2, recall=recall)
            found.append(Candidate(f"anchor recall {recall:g}", "anchor", config))
    return found


def _blasst(shape: Shape) -> list[Candidate]:
    grid = [(128, 128, x) for x in (40.0, 400.0)] + [(32, 64, x) for x in (40.0, 120.0, 400.0, 1200.0)]
    if shape.device == "cuda":
        grid = [(64, 128, x) for x in (40.0, 120.0, 400.0, 1200.0)]
    return [
        Candidate(f"blasst {x:g} on {m}x{n}", "blasst", BlasstConfig(None, x, m, n))
        for m, n, x in grid
        if x <= shape.length and max(m, n) <= shape.length // 2
    ]


def _s2(shape: Shape) -> list[Candidate]:
    if not shape.is_causal:
        return []
    grid = [(2, 4), (2, 8), (2, 16), (4, 8), (8, 4), (8, 16)]
    return [
        Candidate(
            f"s2 {local * 64} stride {stride}",
            "s2",
            S2Config(64, local, stride, sink_blocks=1, per_query_head=True),
        )
        for local, stride in grid
        if local * 64 <= shape.length // 2
    ]


def _sparsed(shape: Shape) -> list[Candidate]:
    if shape.is_causal:  # its selection scores every pair: as dear as attention, unless it is reused
        return []
    return [
        Candidate(f"sparsed {ratio:g}", "sparsed", SparseDConfig(select_ratio=ratio, block_size=64))
        for ratio in (0.05, 0.1, 0.2, 0.3, 0.5)
    ]


_VDIT_PATTERNS = (
    "skip", "diagonal:0.5", "diagonal:1", "diagonal:2", "multi_diagonal:32t", "multi_diagonal:128t",
    "vertical_stripe:first_frame",
)  # fmt: skip


def _vdit(shape: Shape) -> list[Candidate]:
    if shape.video is None or shape.is_causal:
        return []
    frames, height, width, text, first = shape.video
    return [
        Candidate(f"vdit {x}", "vdit", VDiTConfig(x, (frames, height, width), text, first, block_size=64))  # type: ignore[arg-type]
        for x in _VDIT_PATTERNS
    ]


GRIDS: dict[str, Callable[[Shape], list[Candidate]]] = {
    "anchor": _anchor, "blasst": _blasst, "s2": _s2, "sparsed": _sparsed, "vdit": _vdit,
}  # fmt: skip


def _of_method(name: str, shape: Shape) -> list[Candidate]:
    """The grid of a registered method; of one that has none here, what its config class says."""
    if name in GRIDS:
        return GRIDS[name](shape)
    method = METHODS[name]
    own = getattr(method.config, "search_grid", None)
    if own is not None:
        return [Candidate(f"{name} {n}", name, config) for n, config in enumerate(own(shape))]
    required = [
        f.name
        for f in fields(method.config)
        if f.init and f.default is MISSING and f.default_factory is MISSING
    ]
    if required or method.causal != shape.is_causal:
        return []
    return [Candidate(name, name, method.config())]
