"""`Plan`: all that an engine is told about sparsity."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparse_attn.layout import SparseLayout


@dataclass(frozen=True, eq=False)
class Plan:
    """What a selector hands to an engine.

    Attributes:
        layout: which keys each query block reads.
        skip_below: natural logarithm of BLASST's lambda, float32 [B, Hq], or None for no skip.

    The skip rule is part of the contract, because which tiles fall depends on it
    (BLASST, arXiv 2512.12087, Algorithm 1, as every released kernel votes):

    * a tile is one block of the layout: `block_m` queries by `block_n` keys, visited in list order;
    * a query votes to skip when its largest scaled logit in the tile is below its running maximum
      *before* the tile plus `skip_below`; a query that sees no key of the tile, and a padding
      query, votes to skip;
    * only a unanimous tile is skipped, and then changes nothing; otherwise all its queries take
      part in the ordinary update;
    * column lists come after the blocks and are never skipped.
    """

    layout: SparseLayout
    skip_below: Tensor | None = None
