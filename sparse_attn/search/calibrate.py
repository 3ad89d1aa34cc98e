"""BLASST's threshold from a wanted sparsity: lambda = a * exp(b * s) / L (arXiv 2512.12087, section 3.3).

A tile falls when all its rows' largest logits lie below their running maxima plus ln(lambda). For lambda of
at most 1 a skipped tile never raises a maximum, so the running maxima do not depend on lambda: one dense
pass gives, for every tile, the ln(lambda) at which it falls, and with them the sparsity at every lambda.

The fit is written and read as Hugging Face's `sparse_attention_config` block, which TensorRT-LLM and
ModelOpt use.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_attn.recipe_model import Fingerprint
from sparse_attn.recipe_plan import HeadGroup, LayerPlan
from sparse_attn.version import __version__

# ModelOpt's trial values of lambda.
TRIALS = (
    1e-6, 5e-6, 1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95,
    0.99,
)  # fmt: skip
LOWEST, HIGHEST = 0.1, 0.9  # sparsities that enter a fit
FEWEST = 3  # points of a fit
FORMULA = "a * exp(b * target_sparsity)"
_ROWS = 1 << 22  # logits held at once


@dataclass(frozen=True)
class Fit:
    """lambda * L = a * exp(b * sparsity).

    Attributes:
        a, b: of the formula.
        r2: share of the variance of ln(lambda * L) that it explains.
        low, high: least and greatest sparsity among the points; targets outside are extrapolated.
        points: how many there were.
    """

    a: float
    b: float
    r2: float = 1.0
    low: float = 0.0
    high: float = 1.0
    points: int = 0

    def threshold_scale(self, target: float) -> float:
        """lambda * L for a sparsity: the `threshold_scale` of `blasst_attention`.

        Raises:
            ValueError: the target is not in [0, 1).
        """
        if not 0 <= target < 1:
            raise ValueError(
                f"calibrate: the target sparsity is {target}; it must be at least 0 and below 1."
            )
        return self.a * math.exp(self.b * target)


@torch.no_grad()
def tile_margins(
    q: Tensor, k: Tensor, *, block_m: int, block_n: int, scale: float, is_causal: bool = True
) -> Tensor:
    """ln(lambda) above which each tile is skipped.

    Args:
        q: [B, Hq, L, D]; k: [B, Hkv, S, D].
        block_m, block_n: the kernel's tile.

    Returns:
        float32 [B, Hq, Lb, Sb]: the tile is skipped exactly if this is below ln(lambda), for any lambda of at
        most 1. NaN where no query of the block sees a key of the tile, inf in the first tile of a row.
    """
    B, Hq, L, _ = q.shape
    Hkv, S = k.shape[1:3]
    Lb, Sb = -(-L // block_m), -(-S // block_n)
    result = torch.full((B, Hq, Lb, Sb), torch.nan)
    keys = torch.arange(S, device=q.device)
    step = max(_ROWS // (S * block_m), 1) * block_m
    for b in range(B):
        for h in range(Hq):
            own = k[b, h * Hkv // Hq].float()
            for top in range(0, L, step):
                rows = torch.arange(top, min(top + step, L), device=q.device)
                logits = q[b, h, rows].float() @ own.mT * scale
                if is_causal:
                    logits = logits.masked_fill(keys > rows[:, None] + S - L, -torch.inf)
                first = top // block_m
                part = _margins(logits, block_m, block_n)
                result[b, h, first : first + part.shape[0]] = part.cpu()
    return result


def _margins(logits: Tensor, block_m: int, block_n: int) -> Tensor:
    """[rows, S] -> [row blocks, key blocks]"""
    rows, S = logits.shape
    pad = (0, -S % block_n, 0, -rows % block_m)
    logits = torch.nn.functional.pad(logits, pad, value=-torch.inf)
    largest = logits.unflatten(1, (-1, block_n)).amax(-1)  # [rows, key blocks]
    before = largest.cummax(1).values.roll(1, 1)
    before[:, 0] = -torch.inf
    margin = torch.where(before == -torch.inf, torch.inf, largest - before)
    margin = margin.masked_fill(largest == -torch.inf, torch.nan)  # sees nothing of the tile: votes skip
    margin = margin.unflatten(0, (-1, block_m))
    seen = ~margin.isnan()
    return (
        margin.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        .amax(1)
        .masked_fill(~seen.any(1), torch.nan)
    )


def sparsity_at(margins: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Share of the visible tiles that fall at each lambda: float64 [B, Hq, lambdas]."""
    logs = torch.tensor([math.log(x) for x in thresholds])
    visible = ~margins.isnan()
    falls = [((margins < x) & visible).sum((-1, -2)) for x in logs]
    return torch.stack(falls, -1).double() / visible.sum((-1, -2)).clamp(min=1)[..., None]


class Sparsities:
    """An attention function that is dense and notes, of every call, the sparsity at each trial lambda.

    Args:
        block_m, block_n: the kernel's tile in prefill; a decoding step has one query and the same keys.
        decode_queries: last queries of a call that also count as decoding steps; 0: none.
        thresholds: trial lambdas.
    """

    def __init__(
        self,
        *,
        block_m: int = 128,
        block_n: int = 128,
        decode_queries: int = 16,
        thresholds: Sequence[float] = TRIALS,
    ) -> None:
        self.block_m, self.block_n, self.decode_queries = block_m, block_n, decode_queries
        self.thresholds = tuple(thresholds)
        # phase -> layer -> [(key length, [heads, lambdas])]
        self.seen: dict[str, dict[int, list[tuple[int, np.ndarray]]]] = {"prefill": {}, "decode": {}}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, is_causal: bool, scale: float
    ) -> Tensor:
        from sparse_attn.search.capture import sdpa

        S = k.shape[2]
        margins = tile_margins(
            q, k, block_m=self.block_m, block_n=self.block_n, scale=scale, is_causal=is_causal
        )
        self._note("prefill", layer, S, margins)
        if self.decode_queries and is_causal:
            last = q[:, :, -self.decode_queries :]
            margins = tile_margins(last, k, block_m=1, block_n=self.block_n, scale=scale)
            self._note("decode", layer, S, margins)
        return sdpa(q, k, v, is_causal=is_causal, scale=scale)

    def _note(self, phase: str, layer: int, length: int, margins: Tensor) -> None:
        share = sparsity_at(margins, self.thresholds).mean(0).numpy()
        self.seen[phase].setdefault(layer, []).append((length, share))

    def points(
        self, phase: str, layer: int | None = None, head: int | None = None
    ) -> list[tuple[int, float, float]]:
        """(length, lambda, sparsity), of one head, or the mean over the heads of a layer, or over all layers
        with equal weight."""
        layers = self.seen[phase] if layer is None else {layer: self.seen[phase][layer]}
        calls = [
            (same[0][0], np.mean([x if head is None else x[head : head + 1] for _, x in same], (0, 1)))
            for same in zip(*layers.values(), strict=True)
        ]
        return [
            (length, x, float(s)) for length, row in calls for x, s in zip(self.thresholds, row, strict=True)
        ]


def _rising(points: Iterable[tuple[int, float, float]]) -> Iterator[tuple[int, float, float]]:
    """Of each length, the trials that skip at least one percent more than the one before: a sparsity's
    threshold is the least lambda that reaches it, and where the curve is flat the others say nothing."""
    reached: dict[int, float] = {}
    for length, x, s in sorted(points):
        if s > reached.get(length, 0.0) + 0.01:
            reached[length] = s
            yield length, x, s


def fit(points: Iterable[tuple[int, float, float]]) -> Fit:
    """Least squares of ln(lambda * L) = ln(a) + b * s over the points with 0.1 <= s <= 0.9 at which
    the sparsity still rises.

    Args:
        points: (length L, lambda, sparsity s).

    Raises:
        ValueError: fewer than three such points, or all of one sparsity.
    """
    used = [(s, math.log(x * length)) for length, x, s in _rising(points) if LOWEST <= s <= HIGHEST]
    if len(used) < FEWEST or len({s for s, _ in used}) < 2:
        raise ValueError(
            f"calibrate: only {len(used)} trials gave a sparsity between {LOWEST} and {HIGHEST}; "
            "use longer texts, smaller tiles or more values of lambda."
        )
    s, y = np.array(used).T
    design = np.stack([np.ones_like(s), s], 1)
    (log_a, b), *_ = np.linalg.lstsq(design, y, rcond=None)
    if b < 0:  # a sparsity that falls with lambda is noise
        log_a, b = y.mean(), 0.0
    residual = y - (log_a + b * s)
    r2 = 1 - residual.var() / max(y.var(), 1e-12)
    return Fit(float(np.exp(log_a)), float(b), float(r2), float(s.min()), float(s.max()), len(used))


# -- Hugging Face's block -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """Fits by phase, with the sparsities to aim for.

    Attributes:
        fits: "prefill" and "decode" (or "all", for models with one phase) -> fit.
        target: phase -> sparsity.
        targets: class names of the attention modules meant.
        ignore: names (with wildcards) of modules that stay dense.
    """

    fits: Mapping[str, Fit]
    target: Mapping[str, float]
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def threshold_scale(self, phase: str = "prefill") -> float:
        """lambda * L in a phase: `blasst_attention(..., threshold_scale=...)`.

        Raises:
            ValueError: no fit for this phase.
        """
        key = phase if phase in self.fits else "all"
        if key not in self.fits:
            raise ValueError(f"calibrate: there is no fit for {phase}; there is {', '.join(self.fits)}.")
        return self.fits[key].threshold_scale(self.target.get(phase, self.target.get("all", 0.5)))

    def to_block(self) -> dict[str, Any]:
        """The `sparse_attention_config` block of a model's config.json."""
        factor: dict[str, Any] = {"formula": FORMULA}
        for phase, x in self.fits.items():
            factor["coefficients" if phase == "all" else phase] = {"a": x.a, "b": x.b}
        target: Any = dict(self.target)
        group: dict[str, Any] = {"algorithm": "skip_softmax", "targets": list(self.targets)}
        if self.ignore:
            group["ignore"] = list(self.ignore)
        group |= {"threshold_scale_factor": factor, "target_sparsity": target.get("all", target)}
        return {
            "config_groups": {"group_0": group},
            "producer": {"name": "sparse_attn", "version": __version__},
        }

    @classmethod
    def from_block(cls, block: Mapping[str, Any]) -> Calibration:
        """Read such a block, ours or another producer's; also a whole config that holds one.

        Raises:
            ValueError: no block, no skip-softmax group or several, another formula, or a missing number.
        """
        block = block.get("sparse_attention_config", block)
        groups = block.get("config_groups", {}) if isinstance(block, Mapping) else {}
        found = {n: g for n, g in groups.items() if g.get("algorithm") == "skip_softmax"}
        if len(found) != 1:
            raise ValueError(
                f"sparse_attention_config: {len(found)} groups have algorithm 'skip_softmax', not one"
            )
        ((name, group),) = found.items()
        factor = group.get("threshold_scale_factor", {})
        if factor.get("formula", FORMULA).replace(" ", "") != FORMULA.replace(" ", ""):
            raise ValueError(
                f"{name}.threshold_scale_factor.formula: {factor['formula']!r} is not {FORMULA!r}"
            )
        phases = {"all" if p == "coefficients" else p: x for p, x in factor.items() if isinstance(x, Mapping)}
        place = f"{name}.threshold_scale_factor"
        fits = {p: Fit(_a(x, f"{place}.{p}"), float(x.get("b", 0.0))) for p, x in phases.items()}
        if not fits:
            raise ValueError(
                f"{name}.threshold_scale_factor: has neither 'prefill', 'decode' nor 'coefficients'"
            )
        target = group.get("target_sparsity", 0.5)
        target = dict(target) if isinstance(target, Mapping) else {"all": float(target)}
        return cls(fits, target, tuple(group.get("targets", ())), tuple(group.get("ignore", ())))


def _a(coefficients: Mapping[str, Any], where: str) -> float:
    if "a" in coefficients:
        return float(coefficients["a"])
    if "log_a" in coefficients:
        return math.exp(float(coefficients["log_a"]))
    raise ValueError(f"{where}: has neither 'a' nor 'log_a'")


# -- a recipe -------------------------------------------------------------------------------------------


def recipe_layers(
    seen: Sparsities, fingerprint: Fingerprint, target: float, *, per_head: bool, whole: Fit
) -> list[LayerPlan]:
    """BLASST in every layer, for a recipe.

    Args:
        per_head: a threshold of its own for every head, so that each comes to the target; heads without
            enough points take that of the model. False: one for all.
        whole: the model's fit.
    """
    from sparse_attn.methods.blasst import BlasstConfig

    heads = tuple(range(fingerprint.num_heads))
    layers = []
    for layer in range(fingerprint.num_layers):
        scale: float | Tensor = whole.threshold_scale(target)
        if per_head:
            scale = torch.tensor([_head_fit(seen, layer, h, whole).threshold_scale(target) for h in heads])
        config = BlasstConfig(None, scale, seen.block_m, seen.block_n)
        layers.append(LayerPlan(layer, (HeadGroup(heads, "blasst", config),), "prefill"))
    return layers


def _head_fit(seen: Sparsities, layer: int, head: int, whole: Fit) -> Fit:
    try:
        return fit(seen.points("prefill", layer, head))
    except ValueError:
        return whole
