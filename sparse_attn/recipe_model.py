"""Which model and which data a recipe belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What a config calls the same number in transformers and in diffusers; the first present one counts.
_NAMES = {
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "num_heads": ("num_attention_heads", "n_head"),
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim", "attention_head_dim"),
}
_WIDTHS = ("hidden_size", "n_embd")
# Fields that change with the machine or the versions, not with the model; and the architecture, which is
# compared by itself and absent until a model is first saved.
_VOLATILE = frozenset(
    ("transformers_version", "torch_dtype", "dtype", "use_cache", "attn_implementation", "output_attentions",
     "architectures", "output_hidden_states", "return_dict", "quantization_config", "sparse_attention_config")
)  # fmt: skip


@dataclass(frozen=True)
class Fingerprint:
    """Which model a recipe is for.

    Attributes:
        architecture: e.g. "LlamaForCausalLM" or "WanTransformer3DModel".
        num_layers: attention layers.
        num_heads, num_kv_heads: query and key heads of a layer, over all tensor-parallel ranks.
        head_dim: size of a head.
        config_hash: "sha256:..." of the model's config, see `of`.
    """

    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    config_hash: str

    @classmethod
    def of(
        cls, config: Any, *, architecture: str | None = None, num_layers: int | None = None
    ) -> Fingerprint:
        """The fingerprint of a model's config.

        The hash covers every field of the config as JSON but those that begin with an underscore and
        those that change with the machine or the versions (dtype, cache, attention implementation,
        quantization, version numbers).

        Args:
            config: a transformers or diffusers config, a dict of its fields, or a model that has one.
            architecture: default: `architectures[0]` of the config, else its class name.
            num_layers: default: the config's; to be given where attention layers are counted in
                several fields.

        Raises:
            ValueError: fields that cannot be found.
        """
        name = config.get("_class_name") if isinstance(config, Mapping) else None
        if not isinstance(config, Mapping) and hasattr(config, "config"):
            name, config = type(config).__name__, config.config
        name = architecture or name or next(iter(_field(config, "architectures") or []), None)
        inner = config.get_text_config() if hasattr(config, "get_text_config") else config
        numbers = {key: _first(inner, names) for key, names in _NAMES.items()}
        numbers["num_layers"] = num_layers or numbers["num_layers"]
        numbers["num_kv_heads"] = numbers["num_kv_heads"] or numbers["num_heads"]
        width = _first(inner, _WIDTHS)
        if numbers["head_dim"] is None and width and numbers["num_heads"]:
            numbers["head_dim"] = width // numbers["num_heads"]
        if name is None and not isinstance(config, Mapping):
            name = type(config).__name__
        missing = [key for key, value in {"architecture": name, **numbers}.items() if value is None]
        if missing:
            raise ValueError(
                f"Fingerprint.of: the config does not tell {', '.join(missing)}; "
                "construct Fingerprint(...) with them, and take config_hash from hash_config."
            )
        return cls(name, **numbers, config_hash=hash_config(config))  # type: ignore[arg-type]


def _field(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _first(config: Any, names: Iterable[str]) -> int | None:
    found = (_field(config, name) for name in names)
    return next((x for x in found if isinstance(x, int) and not isinstance(x, bool)), None)


def hash_config(config: Any) -> str:
    """ "sha256:..." of a config's lasting fields, as `Fingerprint.of` describes."""
    plain = dict(config) if isinstance(config, Mapping) else config.to_dict()
    text = json.dumps(_lasting(plain), sort_keys=True, default=str)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _lasting(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    kept = {k: v for k, v in value.items() if not str(k).startswith("_") and k not in _VOLATILE}
    return {str(k): _lasting(v) for k, v in kept.items()}


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """ "sha256:..." over dtype, shape and bytes of each tensor, for `Recipe.calibration_hash`."""
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
