"""Sparse attention for PyTorch: five published methods, one layout, several engines."""

from typing import TYPE_CHECKING, Any

from sparse_attn.attend import attend
from sparse_attn.engines import use_engine
from sparse_attn.functional import (
    anchor_attention,
    blasst_attention,
    s2_attention,
    sparse_attention,
    sparse_attention_paged,
    sparse_attention_varlen,
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

if TYPE_CHECKING:
    from sparse_attn.integrations.dlm import denoising as denoising
    from sparse_attn.integrations.patching import explain as explain
    from sparse_attn.integrations.patching import patch as patch
    from sparse_attn.integrations.patching import patched as patched
    from sparse_attn.integrations.patching import unpatch as unpatch
    from sparse_attn.integrations.s2_cache import S2Cache as S2Cache
    from sparse_attn.integrations.sdpa import sdpa_patched as sdpa_patched
    from sparse_attn.integrations.transformers import register as register

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
    "sparse_attention_paged",
    "sparse_attention_varlen",
    "sparsed_attention",
    "use_engine",
    "vdit_attention",
]

# Adapters, imported when first named: they may need packages that `import sparse_attn` must not.
_LAZY = {
    "S2Cache": "s2_cache",
    "denoising": "dlm",
    "explain": "patching",
    "patch": "patching",
    "patched": "patching",
    "register": "transformers",
    "sdpa_patched": "sdpa",
    "unpatch": "patching",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.integrations.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
