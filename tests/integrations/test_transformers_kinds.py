"""Models that are no decoder stacks: encoders, encoder-decoders, relative positions, vision."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

sys.path.insert(0, str(Path(__file__).parent))
from test_transformers_patch import error, tokens  # noqa: E402

import sparse_attn as sa  # noqa: E402
from sparse_attn.integrations.transformers import NAME, DenseFallbackWarning  # noqa: E402
from sparse_attn.recipe import DenseConfig, Fingerprint, HeadGroup, LayerPlan, Recipe  # noqa: E402

S2 = {"block_size": 8, "local_blocks": 1, "vert_stride": 2}
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}
BART = {
    "vocab_size": 128, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "dropout": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}  # fmt: skip
T5 = {
    "vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
    "dropout_rate": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip


def sharpened(model):
    """Attention sharp enough to show errors."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".query.weight", ".key.weight", "q_proj.weight", "k_proj.weight", ".q.weight")):
                parameter *= 20
    return model.eval()


def bert():
    torch.manual_seed(0)
    return sharpened(transformers.BertModel(transformers.BertConfig(**SIZES)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_encoder_runs_sparse_with_padding(side: str) -> None:
    """A padded row gives what it gives alone, and the method runs in it."""
    model, ids = bert(), tokens(2, 48)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    mask = mask if side == "left" else mask.flip(1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    own = mask[1].bool()

    @torch.no_grad()
    def hidden(ids, **inputs) -> torch.Tensor:
        return model(ids, **inputs).last_hidden_state

    stock = hidden(ids, attention_mask=mask, position_ids=positions)
    with sa.patched(model, "s2", **S2):
        both = hidden(ids, attention_mask=mask, position_ids=positions)
        alone = hidden(ids[1:, own])
        first = hidden(ids[:1])
    assert error(both[1, own], alone[0]) < 1e-4 and error(both[0], first[0]) < 1e-4
    assert error(both[1, own], stock[1, own]) > 1e-2
    with sa.patched(model, "s2", vert_stride=1, block_size=8):
        full = hidden(ids, attention_mask=mask, position_ids=positions)
    assert error(full[mask.bool()], stock[mask.bool()]) < 1e-4


def test_a_causal_method_leaves_an_encoder_alone() -> None:
    model, ids = bert(), tokens(1, 48)
    with torch.no_grad():
        stock = model(ids).last_hidden_state
        with pytest.warns(DenseFallbackWarning, match="no layer .*anchor needs causal attention"):
            sa.patch(model, "anchor")
        assert error(model(ids).last_hidden_state, stock) < 1e-4


def test_a_recipe_for_an_encoder() -> None:
    model, ids = bert(), tokens(1, 48)
    groups = (HeadGroup((0, 2), "s2", sa.S2Config(**S2)), HeadGroup((1, 3), "dense", DenseConfig(8)))
    recipe = Recipe(Fingerprint.of(model), tuple(LayerPlan(n, groups) for n in (0, 1)))

    def by_head(q, k, v, *, layer, is_causal, scale):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        out[:, [0, 2]] = sa.s2_attention(q, k, v, **S2, is_causal=is_causal, scale=scale)[:, [0, 2]]
        return out

    with torch.no_grad():
        with sa.patched(model, by_head):
            expected = model(ids).last_hidden_state
        with sa.patched(model, recipe):
            assert error(model(ids).last_hidden_state, expected) < 1e-4


def encoder_decoder(kind: str):
    torch.manual_seed(0)
    settings = BART if kind == "Bart" else T5
    return sharpened(
        getattr(transformers, f"{kind}ForConditionalGeneration")(
            getattr(transformers, f"{kind}Config")(**settings)
        )
    )


@pytest.mark.parametrize("kind", ["Bart", "T5"])
def test_encoder_decoders(kind: str) -> None:
    """Dense equals stock, padding included; cross-attention, also of equal lengths, never runs the method."""
    model, ids, answer = encoder_decoder(kind), tokens(2, 40), tokens(2, 40).flip(1)
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0

    @torch.no_grad()
    def logits() -> torch.Tensor:
        return model(ids, attention_mask=mask, decoder_input_ids=answer).logits

    stock = logits()
    with sa.patched(model, "dense"):
        assert error(logits(), stock) < 1e-4 * stock.abs().max().item()
    calls = []

    def record(q, k, v, *, layer, is_causal, scale):
        calls.append((q.shape[2], is_causal))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)

    if kind == "T5":
        with pytest.warns(UserWarning, match="no layer of this model will be sparse"):
            sa.patch(model, record)
        assert "position bias: runs the model's own eager attention" in sa.explain(model)
    else:
        sa.patch(model, record)
        assert sa.explain(model).count("cross-attention") == 2
    # Of Bart, the padded encoder runs dense, with a warning; the decoder has no padding.
    with nullcontext() if kind == "T5" else pytest.warns(DenseFallbackWarning, match="padding"):
        assert error(logits(), stock) < 1e-4 * stock.abs().max().item()
    assert calls == ([] if kind == "T5" else [(40, True)] * 2)


def test_a_loaded_encoder_decoder_is_told_to_be_patched() -> None:
    model = encoder_decoder("Bart")
    model.config.sparse_attention_config = {"method": "dense"}
    model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match=r"encoder-decoder .* call sparse_attn.patch"):
        model(tokens(1, 8), decoder_input_ids=tokens(1, 8))


def test_layers_without_numbers_follow_the_model() -> None:
    """A vision transformer's layers carry no layer_idx: one setting for all, no recipes, no `layers`."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=32,
        patch_size=4,
    )
    model, image = (
        sharpened(transformers.ViTModel(config, add_pooling_layer=False)),
        torch.randn(1, 3, 32, 32),
    )
    with torch.no_grad():
        stock = model(image).last_hidden_state
        with sa.patched(model, "s2", vert_stride=1, block_size=8):
            assert error(model(image).last_hidden_state, stock) < 1e-4
            assert "carry no layer_idx" in sa.explain(model)
        with sa.patched(model, "s2", **S2):
            assert error(model(image).last_hidden_state, stock) > 1e-3
    groups = (HeadGroup((0, 1, 2, 3), "s2", sa.S2Config(**S2)),)
    recipe = Recipe(Fingerprint.of(model), tuple(LayerPlan(n, groups) for n in (0, 1)))
    for arguments in ((recipe,), ("s2", None)):
        with pytest.raises(ValueError, match=r"no layer_idx|numbered \[\]"):
            sa.patch(model, *arguments, **({} if arguments[0] is recipe else {"layers": {0: "dense"}}))


def diffusion_gemma(global_head_dim: int):
    """Encoder and decoder stacks that share weights, a window in one layer of two, a vision tower."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "global_head_dim": global_head_dim,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"], "num_experts": 2, "top_k_experts": 1,
        "moe_intermediate_size": 32,
    }  # fmt: skip
    vision = {
        "model_type": "gemma4_vision", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
        "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 4,
        "position_embedding_size": 64,
    }  # fmt: skip
    tokens_of = {"image_token_id": 120, "boi_token_id": 121, "eoi_token_id": 122}
    config = transformers.DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=8, **tokens_of
    )
    return sharpened(transformers.DiffusionGemmaForBlockDiffusion(config))


def test_diffusion_gemma() -> None:
    """Generation is the stock one where dense, by either road; heads that no engine runs stay dense."""
    model, ids = diffusion_gemma(32), tokens(1, 40) % 100

    def said() -> list[int]:
        torch.manual_seed(1)
        return model.generate(ids, max_new_tokens=16).sequences[0].tolist()

    stock = said()
    with sa.patched(model, "dense"):
        assert said() == stock
    with sa.patched(model, "s2", vert_stride=1, block_size=8):
        assert said() == stock
        stacks = ("model.encoder.language_model.layers 1 ", "model.decoder.layers 1 ")
        lines = sa.explain(model).splitlines()
        assert all(any(line.startswith(stack) and "s2(" in line for line in lines) for stack in stacks)
    with sa.patched(model, "anchor", theta=1e9, block_size=8, step=2):  # causal layers only: the encoder's
        assert said() == stock
        assert sa.explain(model).count("anchor needs causal attention") == 2, "vision tower and decoder"
    model = diffusion_gemma(512)
    with sa.patched(model, "s2", vert_stride=1, block_size=8):
        assert sa.explain(model).count("heads of size 512: at most 256 is supported") == 2
        assert said()
