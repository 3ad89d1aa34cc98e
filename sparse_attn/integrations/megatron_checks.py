"""What the Megatron adapter refuses, and how a method's config is cut to one tensor-parallel rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_attn.methods import METHODS
from sparse_attn.methods.base import Method

OP = "megatron core attention"
# Fields of a method's config that hold one value for each query head of the model.
_PER_QUERY_HEAD = ("threshold", "threshold_scale", "patterns")
NO_CONTEXT_PARALLEL = (
    f"{OP}: context parallelism is not supported; each rank holds a part of every sequence. Set "
    "context_parallel_size=1 and use tensor, sequence and pipeline parallelism."
)


def resolve(method: str, config: Any, options: dict[str, Any]) -> tuple[Method, Any]:
    if method not in METHODS:
        raise ValueError(f"{OP}: unknown method {method!r}; choose one of {', '.join(METHODS)}.")
    chosen = METHODS[method]
    if config is not None and options:
        raise ValueError(f"{OP}: pass either config or its fields as options, not both.")
    if config is None:
        try:
            config = chosen.config(**options)
        except TypeError as error:  # an option that the config class does not have
            raise ValueError(f"{OP}: {method}: {error}") from error
    if not isinstance(config, chosen.config):
        raise ValueError(f"{OP}: config is {type(config).__name__}; {method} takes {chosen.config.__name__}.")
    return chosen, config


def is_dense_layer(layer_number: int, dense_layers: int | Sequence[int] | None) -> bool:
    """Whether a layer, counted from 1, is among `dense_layers`: every n-th, or those of a list."""
    if dense_layers is None:
        return False
    if isinstance(dense_layers, int):
        return layer_number % dense_layers == 0
    return layer_number in dense_layers


def check_settings(dense_layers: Any, decode: str, on_mask: str, num_layers: int | None) -> None:
    problems = []
    for name, value, allowed in (
        ("decode", decode, ("sparse", "dense")),
        ("on_mask", on_mask, ("check", "ignore")),
    ):
        if value not in allowed:
            problems.append(f"{name} is {value!r}; use {allowed[0]!r} or {allowed[1]!r}")
    if dense_layers is not None:
        numbers = dense_layers if isinstance(dense_layers, (list, tuple, set, range)) else [dense_layers]
        wrong = [n for n in numbers if isinstance(n, bool) or not isinstance(n, int) or n < 1]
        if num_layers is not None and not isinstance(dense_layers, int):
            wrong += [n for n in numbers if n not in wrong and n > num_layers]
        if wrong:
            problems.append(
                f"dense_layers has {wrong}; pass n for every n-th layer, or a list of layer numbers "
                f"from 1 to {num_layers or 'num_layers'}"
            )
    if problems:
        raise ValueError(f"{OP}: " + "; ".join(problems) + ".")


def tensor_rank(config: Any, pg_collection: Any) -> tuple[int, int]:
    """(rank, size) of tensor parallelism."""
    group = getattr(pg_collection, "tp", None)
    if group is not None:
        return group.rank(), group.size()
    if config.tensor_model_parallel_size > 1:
        raise ValueError(
            f"{OP}: tensor_model_parallel_size is {config.tensor_model_parallel_size} but there is no "
            "pg_collection.tp to tell this rank's heads; pass a pg_collection."
        )
    return 0, 1


def refuse_context_parallel(config: Any, pg_collection: Any) -> None:
    group = getattr(pg_collection, "cp", None)
    if config.context_parallel_size > 1 or (group is not None and group.size() > 1):
        raise NotImplementedError(NO_CONTEXT_PARALLEL)


def refuse_config(config: Any, layer_number: int, attention_type: str, size: int) -> None:
    """What the config asks of the attention beyond plain softmax. `apply_query_key_layer_scaling` is
    no such thing: Megatron divides the logits by the layer number, then multiplies them back."""
    problems = []
    if config.num_attention_heads % size:
        problems.append(f"{config.num_attention_heads} heads do not divide over {size} ranks")
    if attention_type != "self":
        problems.append(f"attention_type is {attention_type!r}; only self-attention is covered")
    if getattr(config, "softmax_type", "vanilla") != "vanilla":
        problems.append(f"softmax_type is {config.softmax_type!r}; only 'vanilla' is covered")
    if getattr(config, "window_size", None):
        problems.append(
            f"window_size is {config.window_size}; set it to None (S2's local_blocks is a window)"
        )
    problems += [
        f"{name} is set; the largest logit is not computed: set {name}=False"
        for name in ("qk_clip", "log_max_attention_logit")
        if getattr(config, name, False)
    ]
    if problems:
        raise ValueError(f"{OP}, layer {layer_number}: " + "; ".join(problems) + ".")


def refuse_unknown_groups(method_config: Any, size: int) -> None:
    if getattr(method_config, "num_kv_heads", 0) is not None:
        return  # no such field, or the user says
    if not method_config.per_query_head or method_config.num_dense_heads:
        raise ValueError(
            f"{OP}: config.num_query_groups is {size}, the number of tensor-parallel ranks; Megatron also "
            "says that where the model has fewer groups than ranks, and the pattern depends on it: build the "
            "spec with num_query_groups=, the key heads of the whole model."
        )


def for_rank(method_config: Any, num_heads: int, num_groups: int, heads: range) -> Any:
    """The method's config on a rank that has only the query heads `heads` out of `num_heads`."""
    changes: dict[str, Any] = {}
    problems = []
    names = {field.name for field in fields(method_config)}
    for name, count in (("num_heads", num_heads), ("num_kv_heads", num_groups)):
        given = getattr(method_config, name, None)
        if name in names and given is None:
            changes[name] = count
        elif given not in (None, count):
            problems.append(f"{name} is {given}; the model has {count}")
    for name in sorted(names.intersection(_PER_QUERY_HEAD)):
        value = getattr(method_config, name)
        if not isinstance(value, (Tensor, tuple)) or getattr(method_config, "for_all_heads", False):
            continue
        length = value.shape[-1] if isinstance(value, Tensor) else len(value)
        if length != num_heads:
            problems.append(f"{name} is for {length} heads; the model has {num_heads}")
        part = slice(heads.start, heads.stop)
        changes[name] = value[..., part] if isinstance(value, Tensor) else value[part]
    if getattr(getattr(method_config, "layout", None), "heads", 1) > 1:
        problems.append("layout has a list for each head; with tensor parallelism pass one for all heads")
    if problems:
        raise ValueError(f"{OP}: " + "; ".join(problems) + ".")
    return replace(method_config, **changes) if changes else method_config


def on_device(method_config: Any, device: torch.device) -> Any:
    """The config with its per-head tensors on `device`. They are no buffers: casting a model to
    bfloat16 would round them."""
    moved = {
        name: value.to(device)
        for name in _PER_QUERY_HEAD
        if isinstance(value := getattr(method_config, name, None), Tensor) and value.device != device
    }
    return replace(method_config, **moved) if moved else method_config


def check_alignment(kind: str, L: int, S: int) -> None:
    if kind in ("causal", "padding_causal") and L != S:
        raise ValueError(
            f"{OP}: AttnMaskType.{kind} with {L} queries and {S} keys; Transformer Engine aligns it to the "
            "first key, decoding to the last: pass AttnMaskType.causal_bottom_right if you mean the latter."
        )


_VERDICTS = WeakTensorKeyDictionary()  # mask -> what was asked of it last, and the answer


def says(mask: Tensor, is_causal: bool, L: int, S: int) -> bool:
    """Whether a mask (True: hidden) hides the keys behind the causal edge and no others. The layers of a step
    share one mask, which is read once, and again where it was written to since."""
    if mask.is_inference():  # it counts no writes
        return _says(mask, is_causal, L, S)
    question = (mask._version, is_causal, L, S)
    asked, answer = _VERDICTS.get(mask, (None, False))
    if asked != question:
        answer = _says(mask, is_causal, L, S)
        _VERDICTS[mask] = (question, answer)
    return answer


def _says(mask: Tensor, is_causal: bool, L: int, S: int) -> bool:
    if mask.is_floating_point() or mask.dim() < 2 or mask.shape[-1] != S or mask.shape[-2] not in (1, L):
        return False
    hidden = mask.bool()
    if not is_causal:
        return not bool(hidden.any())
    edge = torch.ones(L, S, dtype=torch.bool, device=mask.device).triu(S - L + 1)
    return bool((hidden == edge).all())


def spans(cu_seqlens: Tensor, padded: Tensor | None) -> list[slice]:
    """Where each sequence's real tokens lie."""
    bounds = cu_seqlens.tolist()
    starts = bounds if padded is None else padded.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    return [slice(start, start + length) for start, length in zip(starts, lengths, strict=False)]
