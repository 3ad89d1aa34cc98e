"""SparseD (arXiv 2509.24014): one block pattern per head, found at an early denoising step of a
diffusion language model and reused at all later ones.

Such a model attends in both directions over prompt and answer at every step. The paper's three
observations give the method: heads differ, so each has its own pattern; a head's pattern hardly changes
between steps, so one is enough; early steps matter most, so they stay dense. Prompt keys and generated
keys are ranked apart ("isolated selection"), since masked answer tokens get little attention at the
step where the pattern is found, and much later.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

from torch import Tensor

from sparse_attn.attend import attend
from sparse_attn.checks import check_inputs
from sparse_attn.layout import SparseLayout
from sparse_attn.methods.base import Context, Method
from sparse_attn.methods.sparsed_layout import OP, SparseDConfig, check_lengths, sparsed_layout
from sparse_attn.plan import Plan
from sparse_attn.reuse import LayoutCache


def sparsed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cache: LayoutCache,
    step: int,
    num_steps: int,
    prompt_len: int | Tensor,
    layer: int = 0,
    skip_ratio: float = 0.2,
    select_ratio: float = 0.3,
    block_size: int = 128,
    mode: str = "paper",
    score_scale: float | None = None,
    per_kv_head: bool = False,
    select_mass: float | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    engine: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """SparseD attention of one layer at one denoising step.

    Dense up to `SparseDConfig.switch_step`; there, dense again and the layer's pattern is found from
    query, key and the log-sum-exp of the dense result (`sparsed_layout`) and put into `cache`; after
    that, attention over the pattern alone.

    Args:
        query: [B, Hq, L, D] float16, bfloat16 or float32, after rotary embedding; key: [B, Hkv, L, D];
            value: [B, Hkv, L, Dv]. Prompt and generated tokens together, so L == S.
        cache: a `LayoutCache` made by the caller, one a generation, shared by all layers.
        step, num_steps: this denoising step, from 0, and their number over the *whole* generation (for
            semi-autoregressive decoding: counted over all blocks).
        prompt_len: tokens before the generated ones, 0 .. L; an int, or an integer tensor [B] with one a
            row (checked against L only where that needs no synchronisation: on the CPU).
        layer: layer number; each layer has its own pattern.
        skip_ratio, select_ratio, block_size, mode, score_scale, per_kv_head, select_mass: see
            `SparseDConfig`.
        is_causal: query i sees keys j <= i. The method is made for bidirectional models: default False.
        scale: multiplies q.k; default D ** -0.5.
        enable_gqa: allow Hq to be a multiple of Hkv.
        return_lse: also return the natural log-sum-exp, float32 [B, Hq, L].
        engine: insist on an engine by name.

    Returns:
        out [B, Hq, L, Dv]; with `return_lse`: (out, lse).

    Raises:
        ValueError: a bad argument, L != S, or a cache used for something else (`LayoutCache`).
        NotImplementedError: no engine can run the call.

    Example:
        >>> cache = LayoutCache()
        >>> for step in range(64):
        ...     out = sparsed_attention(q, k, v, cache=cache, step=step, num_steps=64, prompt_len=900)
    """
    config = SparseDConfig(skip_ratio, select_ratio, block_size, mode, score_scale, per_kv_head, select_mass)
    check_inputs(OP, query, key, value, enable_gqa, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    context = Context(layer=layer, step=step, num_steps=num_steps, prompt_len=prompt_len, cache=cache)
    pattern = _enter_step(query, key, config, context)
    plan = Plan(_full(query, key, config, cache) if pattern is None else pattern)
    result = attend(
        query, key, value, plan, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, engine=engine, op=OP
    )
    if _finds_pattern(config, context):
        lse = result.lse.detach()
        found = sparsed_layout(
            query, key, config, prompt_len=prompt_len, scale=scale, is_causal=is_causal, lse=lse
        )
        cache.put(layer, found)
    return (result.out, result.lse) if return_lse else result.out


def select(
    query: Tensor, key: Tensor, config: SparseDConfig, *, is_causal: bool, scale: float, context: Context
) -> Plan:
    """The generic road (`methods.base.run`).

    With `context.step`: as `sparsed_attention`, except that the switch step computes the normaliser
    itself. Without: the pattern of these very queries and keys, at once and with no cache.
    """

    def find() -> SparseLayout:
        return sparsed_layout(
            query, key, config, prompt_len=context.prompt_len, scale=scale, is_causal=is_causal
        )

    if context.step is None:
        return Plan(find())
    pattern = _enter_step(query, key, config, context)
    if pattern is not None:
        return Plan(pattern)
    if _finds_pattern(config, context):
        context.cache.put(context.layer, find())
    return Plan(_full(query, key, config, context.cache))


# -- checks and steps -----------------------------------------------------------------------------


def _check_context(context: Context) -> None:
    problems = []
    if not isinstance(context.cache, LayoutCache):
        problems.append(
            f"cache is {type(context.cache).__name__}; pass a sparse_attn.LayoutCache, "
            "made once for each generation"
        )
    step, num_steps = context.step, context.num_steps
    if not isinstance(step, Integral) or not isinstance(num_steps, Integral):
        problems.append(f"step is {step!r} and num_steps {num_steps!r}; both must be ints")
    elif not 0 <= step < num_steps:
        problems.append(f"step is {step}; it must be between 0 and num_steps - 1 = {num_steps - 1}")
    if problems:
        raise ValueError(f"{OP}: " + "; ".join(problems) + ".")


def _enter_step(query: Tensor, key: Tensor, config: SparseDConfig, context: Context) -> SparseLayout | None:
    """The layer's pattern on a sparse step, None on a dense one."""
    _check_context(context)
    check_lengths(query, key, context.prompt_len)
    prompt_len: Any = context.prompt_len
    if isinstance(prompt_len, Tensor):  # comparing values on a GPU would synchronise at every step
        prompt_len = prompt_len.tolist() if prompt_len.device.type == "cpu" else str(prompt_len.device)
    signature = {
        "(batch, query heads, key heads, length)": (query.shape[0], query.shape[1], *key.shape[1:3]),
        "device": str(query.device),
        "prompt_len": prompt_len,
        "num_steps": context.num_steps,
        "configuration": config,
    }
    assert context.step is not None and context.num_steps is not None
    switch = config.switch_step(context.num_steps)
    return context.cache.begin(context.layer, context.step, switch_step=switch, signature=signature, op=OP)


def _finds_pattern(config: SparseDConfig, context: Context) -> bool:
    """Whether this is the switch step, and a sparse step follows."""
    assert context.step is not None and context.num_steps is not None
    return context.step == config.switch_step(context.num_steps) < context.num_steps - 1


def _full(query: Tensor, key: Tensor, config: SparseDConfig, cache: LayoutCache) -> SparseLayout:
    """Dense attention as a layout, shared by the layers and steps of a generation."""
    L, S, size = query.shape[2], key.shape[2], config.block_size

    def build() -> SparseLayout:
        return SparseLayout.full(L, S, block_m=size, block_n=size, device=query.device)

    return cache.shared((L, S, size, str(query.device)), build)


SPARSED = Method("sparsed", SparseDConfig, select, sparsed_attention, causal=False)
