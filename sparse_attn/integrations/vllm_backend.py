"""The attention backend that vLLM loads: its own Triton backend, but for prefill of sparse layers.

A batch holds sequences with one new token (decoding) and with many (prefill, whole or in chunks, perhaps
over a cached prefix). The sequences that a layer's rule covers are attended by `sparse_attn` through the
paged cache; all others, and layers that no sparse method covers (sliding window, soft cap, sinks, ALiBi),
by vLLM's Triton kernels. Where those cannot run, on a CPU, dense sequences go through
`sparse_attention_paged` as well.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, model_parallel_is_initialized
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionType,
    CommonAttentionMetadata,
    max_decode_query_len,
)
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)

from sparse_attn.integrations.vllm_config import ENV, Heads, Rule, Settings, load_settings
from sparse_attn.varlen import sparse_attention_paged

_log = logging.getLogger("sparse_attn")


@cache
def settings() -> Settings:
    """Those of the environment, read once a process."""
    return load_settings()


def runs_vllm_kernels(tensor: Tensor) -> bool:
    """Whether vLLM's Triton kernels can run on this tensor's device."""
    return tensor.is_cuda


# -- the batch ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """Neighbouring sequences of a batch that run alike.

    Attributes:
        kind: "prefill", "decode" or "dense". Decoding by the rules of prefill is "prefill" too.
        first, last: tokens first .. last - 1 of the batch.
        cu_seqlens_q: where each sequence begins, from the segment's first token.
        seqused_k: keys of each sequence, or None where only vLLM's kernels will read the segment.
        metadata: what those kernels need.
    """

    kind: str
    first: int
    last: int
    cu_seqlens_q: list[int]
    seqused_k: list[int] | None
    metadata: TritonAttentionMetadata


class SparseAttnMetadataBuilder(TritonAttentionMetadataBuilder):
    """vLLM's metadata, with the segments of the batch beside it, cut once for all layers."""

    # vLLM puts sequences with at most so many new tokens first.
    reorder_batch_threshold: int | None = 1

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.most_decode_tokens = max_decode_query_len(vllm_config)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        if settings().decodes_sparse:
            self.supports_draft_decode_metadata_update = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Graphs may hold batches that only decode, by vLLM's kernels; what `sparse_attn` runs reads
        lengths on the host."""
        if settings().decodes_sparse:
            return AttentionCGSupport.NEVER
        if max_decode_query_len(vllm_config) > 1:
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TritonAttentionMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.segments = self._segments(metadata, common_attn_metadata)
        return metadata

    def _segments(
        self, metadata: TritonAttentionMetadata, common: CommonAttentionMetadata
    ) -> list[Segment] | None:
        """None where the whole batch is dense and vLLM's kernels can run it."""
        starts = common.query_start_loc_cpu.tolist()
        lengths = [b - a for a, b in pairwise(starts)]
        on_gpu = runs_vllm_kernels(metadata.seq_lens)
        sparse_decode = settings().decodes_sparse
        has_prefill = any(n > self.most_decode_tokens for n in lengths)
        if metadata.causal is not True:
            has_prefill = sparse_decode = False
        if on_gpu and not (has_prefill or (sparse_decode and any(lengths))):
            return None
        keys = self._keys(common, lengths)
        decode = "dense" if not sparse_decode else "decode" if settings().has_decode_rules else "prefill"
        kinds = []
        for num_queries, num_keys in zip(lengths, keys, strict=True):
            covered = metadata.causal is True and num_keys >= settings().min_keys
            new = num_queries > self.most_decode_tokens
            kinds.append("dense" if not covered else "prefill" if new else decode)
        if on_gpu and all(kind == "dense" for kind in kinds):
            return None
        segments, first = [], 0
        for n in range(1, len(kinds) + 1):
            if n == len(kinds) or kinds[n] != kinds[first]:
                if starts[n] > starts[first]:  # not the padding of a graph
                    segments.append(_segment(kinds[first], first, n, starts, keys, metadata, on_gpu))
                first = n
        return segments

    def _keys(self, common: CommonAttentionMetadata, lengths: list[int]) -> list[int]:
        """Keys of each sequence. vLLM's upper bound on the host is exact but for drafts of speculative
        decoding; where sequences that decode are run here, it must be exact, which waits for the GPU."""
        bound = common.seq_lens_cpu_upper_bound
        decodes = any(0 < n <= self.most_decode_tokens for n in lengths)
        here = settings().decodes_sparse or not runs_vllm_kernels(common.seq_lens)
        if bound is None or (decodes and here):
            return common.seq_lens.tolist()
        return bound.tolist()


def _segment(
    kind: str,
    first: int,
    last: int,
    starts: list[int],
    keys: list[int],
    metadata: TritonAttentionMetadata,
    on_gpu: bool,
) -> Segment:
    """Sequences first .. last - 1."""
    begin, end = starts[first], starts[last]
    cu = [x - begin for x in starts[first : last + 1]]
    own = replace(
        metadata,
        num_actual_tokens=end - begin,
        max_query_len=max(b - a for a, b in pairwise(cu)),
        query_start_loc=metadata.query_start_loc[first : last + 1] - begin,
        max_seq_len=max(keys[first:last]),
        seq_lens=metadata.seq_lens[first:last],
        block_table=metadata.block_table[first:last],
    )
    known = None if on_gpu and kind == "dense" else keys[first:last]
    return Segment(kind, begin, end, cu, known, own)


# -- the layer ----------------------------------------------------------------------------------------


class SparseAttnImpl(TritonAttentionImpl):
    """One attention layer. Its number, and with it its rules, are known at its first call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.supports_quant_query_input = False
        self.not_covered = self._why_not_covered()
        self.rules: dict[str, Rule | None] | None = None
        self.layer, self.num_layers = 0, None
        # Its cache, and the keys and values of that: [num_pages, page_size, num_kv_heads, head_size].
        self.viewed: Tensor | None = None
        self.caches: tuple[Tensor, ...] = ()
        self.heads = Heads(self.num_heads, self.num_kv_heads, self.num_heads, self.num_kv_heads)
        config = get_current_vllm_config_or_none()
        if config is not None and config.model_config is not None:
            model, size = config.model_config, config.parallel_config.tensor_parallel_size
            self.num_layers = model.get_total_num_hidden_layers()
            settings().check_model(model.hf_config, self.num_layers)
            total_kv = model.get_total_num_kv_heads()
            rank = get_tensor_model_parallel_rank() if model_parallel_is_initialized() else 0
            self.heads = replace(
                self.heads, total=self.num_heads * size, total_kv=total_kv, offset=rank * self.num_heads
            )
            if total_kv < size and settings().follows_heads:
                raise ValueError(
                    f"sparse_attn: {size} tensor-parallel ranks share the model's {total_kv} key heads, and "
                    f"what {ENV} asks for differs by head; use at most {total_kv} ranks."
                )

    def _why_not_covered(self) -> str:
        """Why no sparse method covers this layer; empty where one may."""
        reasons = {
            "a sliding window": self.sliding_window != (-1, -1),
            "a soft cap": bool(self.logits_soft_cap),
            "ALiBi": self.alibi_slopes is not None,
            "attention sinks": self.sinks is not None,
            f"attention of type {self.attn_type}": self.attn_type != AttentionType.DECODER,
            "chunked attention": self.chunk_lookback > -1,
        }
        return ", ".join(reason for reason, holds in reasons.items() if holds)

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False

    def fused_rope_kvcache_supported(self) -> bool:
        return False

    def rules_of(self, name: str) -> dict[str, Rule | None]:
        """The layer's rules by kind of segment, from its name, such as "model.layers.3.self_attn.attn"."""
        if self.rules is None:
            self.layer = extract_layer_index(name)
            if self.num_layers is not None and self.layer >= self.num_layers:
                self.not_covered = self.not_covered or "a number beyond the model's layers (a draft head)"
            self.rules = {"prefill": None, "decode": None, "dense": None}
            if not self.not_covered:
                self.rules["prefill"] = settings().rule_for(self.layer)
                self.rules["decode"] = settings().rule_for(self.layer, decode=True)
            why = f" ({self.not_covered})" if self.not_covered else ""
            told = {kind: str(self.rules[kind] or "dense") for kind in ("prefill", "decode")}
            _log.info("layer %d: prefill %s, decode %s%s", self.layer, told["prefill"], told["decode"], why)
        return self.rules

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of a batch, written into `output`; shapes as vLLM's Triton backend has them.

        Args:
            query: [T, num_heads, head_size]; padding may follow the batch's tokens.
            kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_size], keys then values, which already
                holds the keys of this batch.
            attn_metadata: from `SparseAttnMetadataBuilder`; None in vLLM's profiling run.
            output: [T, num_heads, head_size].
        """
        if attn_metadata is None:
            return output.fill_(0)
        rules = self.rules_of(layer.layer_name)
        segments = attn_metadata.segments
        if segments is None or (runs_vllm_kernels(query) and not any(rules[x.kind] for x in segments)):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        if self.viewed is not kv_cache:
            self.viewed, self.caches = kv_cache, kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        for segment in segments:
            q, out, length = query, output, segment.last - segment.first
            if length < len(query):
                q, out = query.narrow(0, segment.first, length), output.narrow(0, segment.first, length)
            rule = rules[segment.kind]
            if rule is None and runs_vllm_kernels(query):
                super().forward(layer, q, None, None, kv_cache, segment.metadata, out)  # type: ignore[arg-type]
            else:
                self._attend(rule, q, segment, out)
        return output

    def _attend(self, rule: Rule | None, query: Tensor, segment: Segment, out: Tensor) -> None:
        """By `sparse_attn`; query and out are [tokens, num_heads, head_size]."""
        if self.not_covered:
            raise NotImplementedError(
                f"sparse_attn: layer {self.layer} has {self.not_covered}, which vLLM's Triton kernels run on "
                "a GPU; there is none here."
            )
        k_cache, v_cache = self.caches
        assert segment.seqused_k is not None
        pages: dict[str, Any] = {
            "cu_seqlens_q": segment.cu_seqlens_q,
            "block_table": segment.metadata.block_table,
            "seqused_k": segment.seqused_k,
            "engine": settings().engine,
            "out": out,
        }
        if rule is not None:
            rule.attend(
                query, k_cache, v_cache, scale=self.scale, layer=self.layer, heads=self.heads, **pages
            )
            return
        causal = segment.metadata.causal
        if not isinstance(causal, bool):
            raise NotImplementedError("sparse_attn: causality by sequence needs vLLM's Triton kernels.")
        sparse_attention_paged(
            query, k_cache, v_cache, is_causal=causal, scale=self.scale, enable_gqa=True, trust_table=True,
            **pages,
        )  # fmt: skip

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write new keys and values [T, num_kv_heads, head_size] into their slots; negative slots are
        padding."""
        if runs_vllm_kernels(kv_cache):
            return super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        size = kv_cache.shape[2]
        real = (slot_mapping >= 0).nonzero()[:, 0]
        slots = slot_mapping[real].long()
        k_cache, v_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        k_cache[slots // size, slots % size] = key[real].to(kv_cache.dtype)
        v_cache[slots // size, slots % size] = value[real].to(kv_cache.dtype)
        return None


class SparseAttnBackend(TritonAttentionBackend):
    """What vLLM is told of the backend. `is_sparse()` stays False: to vLLM it means models that choose
    their own top keys."""

    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16"]  # noqa: RUF012 as vLLM declares it

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # must be a member of vLLM's enum

    @staticmethod
    def get_impl_cls() -> type[SparseAttnImpl]:
        return SparseAttnImpl

    @staticmethod
    def get_builder_cls() -> type[SparseAttnMetadataBuilder]:
        return SparseAttnMetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 32 <= head_size <= 256

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # segments are cut by the host's lengths

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False
