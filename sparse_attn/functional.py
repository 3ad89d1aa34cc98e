"""The page a user reads: every operator of the package.

Letters: B batch, Hq and Hkv query and key heads, L query length, S key length, D head size, Dv value
head size. All tensors are (B, H, length, head size), as in `scaled_dot_product_attention`.
"""

from __future__ import annotations

from torch import Tensor

from sparse_attn.attend import attend
from sparse_attn.layout import SparseLayout
from sparse_attn.methods.anchor import anchor_attention
from sparse_attn.methods.blasst import blasst_attention
from sparse_attn.methods.s2 import s2_attention
from sparse_attn.methods.sparsed import sparsed_attention
from sparse_attn.methods.vdit import vdit_attention
from sparse_attn.plan import Plan
from sparse_attn.varlen import sparse_attention_paged, sparse_attention_varlen

__all__ = [
    "anchor_attention",
    "blasst_attention",
    "s2_attention",
    "sparse_attention",
    "sparse_attention_paged",
    "sparse_attention_varlen",
    "sparsed_attention",
    "vdit_attention",
]


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SparseLayout,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    engine: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the keys that a `SparseLayout` names.

    Equivalent, at L x S memory, to::

        mask = layout.to_dense(is_causal)
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

    Args:
        query: [B, Hq, L, D] float16, bfloat16 or float32; strides free while the last is 1.
        key: [B, Hkv, S, D]. value: [B, Hkv, S, Dv]; Dv may differ from D.
        layout: made for this L and S; its batch is 1 or B, its heads 1, Hkv or Hq.
        is_causal: query i sees keys j <= i + S - L, **bottom-right aligned**
            (`scaled_dot_product_attention` is upper-left; they agree when L == S).
        scale: multiplies q.k; default D ** -0.5.
        enable_gqa: allow Hq to be a multiple of Hkv.
        return_lse: also return the natural log-sum-exp, float32 [B, Hq, L].
        engine: insist on an engine: "hopper", "triton", "cpu" or "reference".

    Returns:
        out [B, Hq, L, Dv]; a query that attends no key gives 0 and an lse of -inf.
        With `return_lse`: (out, lse).

    Raises:
        ValueError: a bad argument. NotImplementedError: no engine can run the call.

    Example:
        >>> layout = SparseLayout.window(4096, 4096, left=4)
        >>> out = sparse_attention(q, k, v, layout, is_causal=True)
    """
    result = attend(
        query, key, value, Plan(layout), is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
        engine=engine, op="sparse_attention",
    )  # fmt: skip
    return (result.out, result.lse) if return_lse else result.out
