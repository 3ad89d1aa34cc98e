"""Sparse attention for PyTorch: five published methods, one layout, several engines."""

from sparse_attn.attend import attend
from sparse_attn.engines import use_engine
from sparse_attn.functional import (
    anchor_attention,
    blasst_attention,
    s2_attention,
    sparse_attention,
    sparsed_attention,
    vdit_attention,
)
from sparse_attn.layout import SparseLayout
from sparse_attn.methods.s2 import S2Config
from sparse_attn.methods.sparsed import SparseDConfig
from sparse_attn.methods.vdit import VDiTConfig
from sparse_attn.plan import Plan
from sparse_attn.reuse import LayoutCache
from sparse_attn.version import __version__

__all__ = [
    "LayoutCache",
    "Plan",
    "S2Config",
    "SparseDConfig",
    "SparseLayout",
    "VDiTConfig",
    "__version__",
    "anchor_attention",
    "attend",
    "blasst_attention",
    "s2_attention",
    "sparse_attention",
    "sparsed_attention",
    "use_engine",
    "vdit_attention",
]
