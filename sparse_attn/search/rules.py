"""What a search is asked for, and whom it tells how far it is."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Protocol


@dataclass(frozen=True)
class Budget:
    """How much a recipe may change the model. Exactly one is given.

    Attributes:
        perplexity: relative rise of the perplexity over the calibration samples, 0.01 for one percent.
        divergence: sum of the estimated divergences of all heads, nats a token.
        relative_error: root mean square over all heads of |out - dense| / |dense|.
        agreement: share of the calibration tokens, below 1, after which the most likely next token must stay
            that of the dense model.
    """

    perplexity: float | None = None
    divergence: float | None = None
    relative_error: float | None = None
    agreement: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in asdict(self).items() if v is not None}
        if len(given) != 1 or not all(0 < x < math.inf for x in given.values()) or (self.agreement or 0) >= 1:
            raise ValueError(
                f"search: the budget is {given or 'empty'}; give one of perplexity, divergence, "
                "relative_error and agreement, above 0 (agreement: below 1)."
            )


@dataclass(frozen=True)
class PaperRule:
    """The search of Sparse-vDiT (section 4.2) instead of the knapsack: the candidate of least
    MSE + penalty * (1 - S_i), or full attention where all exceed epsilon."""

    penalty: float = 0.5
    epsilon: float = 1.0


class Progress(Protocol):
    def stage(self, name: str, total: int) -> None: ...
    def advance(self) -> None: ...
    def note(self, text: str) -> None: ...


class Silent:
    def stage(self, name: str, total: int) -> None: ...
    def advance(self) -> None: ...
    def note(self, text: str) -> None: ...
