"""Attention processors of Wan, HunyuanVideo and CogVideoX that run a rule instead of dense attention.

Projections, norms, rotary embedding and output are those of the stock processors; only what happens between
query, key, value and result differs. A step that is dense goes through the stock processor itself.

Under `torch.compile` without gradients a layer's attention is one operator, `sparse_attn::video_attention`,
whose last argument, a tensor, is the number of the processor to run. So one compiled block serves all
layers and steps, and what the layer does may depend on masks and steps without breaking the graph.
"""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_attn.integrations.diffusers_rules import Rule
from sparse_attn.integrations.diffusers_state import CallState, RowGroup, Tokens

_numbers = count()
_processors: WeakValueDictionary[int, SparseProcessor] = WeakValueDictionary()


class SparseProcessor:
    """Base of the processors.

    Attributes:
        stock: the processor it stands in for.
        layer: number, from 0.
        rule: what the layer does.
        state: shared by the model's processors.
    """

    def __init__(self, stock: Any, layer: int, rule: Rule, state: CallState) -> None:
        self.stock, self.layer, self.rule, self.state = stock, layer, rule, state
        self._register()

    def _register(self) -> None:
        number = next(_numbers)
        self.number = torch.tensor(number)
        _processors[number] = self

    def __setstate__(self, fields: dict[str, Any]) -> None:
        """A copy has a number of its own."""
        self.__dict__.update(fields)
        self._register()

    # diffusers sets these two on processors; they are the stock processor's business.

    @property
    def _attention_backend(self) -> Any:
        return getattr(self.stock, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.stock._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.stock, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        if config is not None:
            raise NotImplementedError(
                "sparse_attn: context parallelism splits the sequence, which the sparse layers of this model "
                "do not support; call sparse_attn.unpatch(model) first."
            )
        self.stock._parallel_config = config

    def runs_stock(self) -> bool:
        """Whether the stock processor runs the present call. Compiled graphs leave that to the operator."""
        return not _in_graph() and self.rule.is_dense(self.state.step)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of the layer. q, k, v: [B, H, N, D]; the result: [B, N, H, D]."""
        if _in_graph():
            return torch.ops.sparse_attn.video_attention(q, k, v, scale, self.number)
        return self.attend_now(q, k, v, scale)

    def attend_now(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """`attend`, at once. Padding tokens of the text are neither read nor computed: they give 0."""
        tokens, B, N = self.state.tokens, q.shape[0], q.shape[2]
        if tokens is None or tokens.num_video + tokens.text_len != N:
            raise ValueError(
                f"sparse_attn: layer {self.layer} attends {N} tokens, but the call's {tokens} are others; "
                "call the patched transformer itself, not one of its blocks."
            )
        if self.state.real_text is None:
            return self._rows(q, k, v, tokens, "all", scale).transpose(1, 2)
        if len(self.state.real_text) != B:
            raise ValueError(
                f"sparse_attn: the text mask has {len(self.state.real_text)} rows, layer {self.layer} {B}."
            )
        groups, order = self.state.row_groups, self.state.row_order
        if len(groups) == 1:
            end = groups[0].end
            return self._cut(
                q.narrow(2, 0, end), k.narrow(2, 0, end), v.narrow(2, 0, end), N, groups[0], scale
            )
        parts = []
        for group in groups:
            own = (group.rows, slice(None), slice(group.end))
            parts.append(self._cut(q[own], k[own], v[own], N, group, scale))
        out = torch.cat(parts)
        return out if order is None else out[order]

    def _cut(self, q: Tensor, k: Tensor, v: Tensor, N: int, group: RowGroup, scale: float) -> Tensor:
        """Rows of equally many real tokens, given without their padding, for which 0 is returned."""
        real = self._rows(q, k, v, group.tokens, group.name, scale)
        return torch.constant_pad_nd(real.transpose(1, 2), (0, 0, 0, 0, 0, N - group.end))

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, rows: str, scale: float) -> Tensor:
        """Rows of the batch without padding."""
        if self.rule.is_dense(self.state.step):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        context = self.state.context(self.layer, rows, tokens.prompt_len)
        return self.rule.attend(q, k, v, tokens, context, scale)


def _in_graph() -> bool:
    return torch.compiler.is_compiling() and not torch.is_grad_enabled()


def _video_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, number: Tensor) -> Tensor:
    out = _processors[int(number)].attend_now(q, k, v, scale).contiguous()
    # A function of the user's may hand back what it was given; an operator must not.
    return out.clone() if any(out.data_ptr() == x.data_ptr() for x in (q, k, v)) else out


def _video_attention_fake(q: Tensor, k: Tensor, v: Tensor, scale: float, number: Tensor) -> Tensor:
    B, H, N, _ = q.shape
    return q.new_empty(B, N, H, v.shape[-1])


torch.library.define(
    "sparse_attn::video_attention", "(Tensor q, Tensor k, Tensor v, float scale, Tensor processor) -> Tensor"
)
torch.library.impl("sparse_attn::video_attention", "CompositeExplicitAutograd", _video_attention)
torch.library.register_fake("sparse_attn::video_attention", _video_attention_fake)


# -- one class a family -------------------------------------------------------------------------------
# diffusers hands processors only the keyword arguments that their signature names.


class WanProcessor(SparseProcessor):
    """Self-attention of `WanTransformer3DModel`: video tokens alone."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if self.runs_stock():
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        _refuse_mask(attention_mask)
        if getattr(attn, "fused_projections", False):
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k = attn.norm_q(q), attn.norm_k(k)  # over all heads together
        q, k, v = (_split_heads(x, attn.heads) for x in (q, k, v))
        if rotary_emb is not None:
            q, k = _rotate_pairs(q, *rotary_emb), _rotate_pairs(k, *rotary_emb)
        out = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), q.shape[-1] ** -0.5)
        out = out.flatten(2, 3).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring channels. x [B, N, H, D]; cos and sin [1, N, 1, D] hold each
    angle twice."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


class HunyuanProcessor(SparseProcessor):
    """Joint attention of `HunyuanVideoTransformer3DModel`: video, then text. Blocks with two streams
    have projections of their own for the text; blocks with one put both through the same."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if self.runs_stock():
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        assert encoder_hidden_states is not None
        text_len = encoder_hidden_states.shape[1]
        q, k, v = self._projected(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        out = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), q.shape[-1] ** -0.5)
        out = out.flatten(2, 3).to(q.dtype)
        video, text = out[:, :-text_len], out[:, -text_len:]
        if getattr(attn, "to_out", None) is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text

    @staticmethod
    def _projected(
        attn: Any, video: Tensor, text: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, ...]:
        """q, k and v of video and text, [B, N, H, D]."""
        one_stream = attn.add_q_proj is None
        x = torch.cat([video, text], dim=1) if one_stream else video
        q, k, v = (_split_heads(project(x), attn.heads) for project in (attn.to_q, attn.to_k, attn.to_v))
        q, k = _normed(attn.norm_q, q), _normed(attn.norm_k, k)
        if rotary is not None:
            q, k = (_rotate_part(x, rotary, slice(0, video.shape[1]), dim=1) for x in (q, k))
        if one_stream:
            return q, k, v
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k, text_v = (_split_heads(project(text), attn.heads) for project in added)
        text_q, text_k = _normed(attn.norm_added_q, text_q), _normed(attn.norm_added_k, text_k)
        both = ((q, text_q), (k, text_k), (v, text_v))
        return tuple(torch.cat(pair, dim=1) for pair in both)


class CogVideoXProcessor(SparseProcessor):
    """Joint attention of `CogVideoXTransformer3DModel`: text, then video."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.runs_stock():
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        _refuse_mask(attention_mask)
        text_len = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        projections = (attn.to_q, attn.to_k, attn.to_v)
        q, k, v = (_split_heads(project(x), attn.heads).transpose(1, 2) for project in projections)
        q, k = _normed(attn.norm_q, q), _normed(attn.norm_k, k)
        if image_rotary_emb is not None:
            q, k = (_rotate_part(x, image_rotary_emb, slice(text_len, None), dim=2) for x in (q, k))
        out = self.attend(q, k, v, q.shape[-1] ** -0.5).flatten(2, 3)
        out = attn.to_out[1](attn.to_out[0](out))
        return out[:, text_len:], out[:, :text_len]


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1))


def _normed(norm: Any, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _rotate_part(x: Tensor, rotary: Any, part: slice, dim: int) -> Tensor:
    """Rotary embedding of the video tokens; `dim` counts tokens."""
    from diffusers.models.embeddings import apply_rotary_emb

    length = x.shape[dim]
    start, end = part.start or 0, length if part.stop is None else part.stop
    before, video, after = x.split([start, end - start, length - end], dim)
    rotated: Any = apply_rotary_emb(video, rotary, sequence_dim=dim)
    return torch.cat([before, rotated, after], dim)


def _refuse_mask(mask: Tensor | None) -> None:
    if mask is not None:
        raise ValueError(
            "sparse_attn: an attention mask was passed to a layer whose model has none; sparse layers would "
            "not obey it. Leave it out, or call sparse_attn.unpatch(model)."
        )
