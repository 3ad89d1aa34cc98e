"""Tiny video transformers with random weights, sharp enough in attention for errors to show."""

from __future__ import annotations

import diffusers
import torch
from torch import nn


def sharpened(model: nn.Module) -> nn.Module:
    """Larger norm weights of queries and keys, where the model has them, else larger projections."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attn" not in name or "refiner" in name or name.endswith("bias"):
                continue
            if any(part in name for part in ("norm_q.", "norm_k.", "norm_added_q.", "norm_added_k.")):
                parameter *= 2
    return model.eval()


def wan() -> nn.Module:
    torch.manual_seed(0)
    return sharpened(
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=32, ffn_dim=32, num_layers=3, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        )
    )  # fmt: skip


def hunyuan() -> nn.Module:
    torch.manual_seed(0)
    return sharpened(
        diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2,
            num_single_layers=2, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=False,
            text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
        )
    )  # fmt: skip


def cogvideox(rotary: bool = False) -> nn.Module:
    """Version 1.0, or with `rotary` 1.5: rotary embedding and patches of two frames."""
    torch.manual_seed(0)
    newer = {"patch_size_t": 2, "use_rotary_positional_embeddings": True, "patch_bias": False}
    return sharpened(
        diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2,
            text_embed_dim=32, num_layers=2, sample_width=16, sample_height=16, sample_frames=9, patch_size=2,
            temporal_compression_ratio=4, max_text_seq_length=20, **(newer if rotary else {}),
        )
    )  # fmt: skip


def inputs(name: str, batch: int = 2, timestep: int = 900, dtype: torch.dtype = torch.float32) -> dict:
    """What a pipeline passes: grid (3, 8, 8), for cogvideox-1.5 (2, 8, 8); text of 20 tokens, of which
    hunyuan's rows have 20 and 13."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    t = torch.full((batch,), timestep)
    if name == "wan":
        return {
            "hidden_states": random(batch, 4, 3, 16, 16),
            "timestep": t,
            "encoder_hidden_states": random(batch, 12, 16),
        }
    if name == "hunyuan":
        mask = torch.ones(batch, 20, dtype=torch.bool)
        mask[1:, 13:] = False
        return {
            "hidden_states": random(batch, 4, 3, 16, 16),
            "timestep": t,
            "encoder_hidden_states": random(batch, 20, 16),
            "encoder_attention_mask": mask,
            "pooled_projections": random(batch, 8),
        }
    given = {
        "hidden_states": random(batch, 3 if name == "cogvideox" else 4, 4, 16, 16),
        "timestep": t,
        "encoder_hidden_states": random(batch, 20, 32),
    }
    if name == "cogvideox-1.5":
        angles = torch.rand(2 * 8 * 8, 8, generator=generator).repeat_interleave(2, dim=1) * 6
        given["image_rotary_emb"] = (angles.cos(), angles.sin())
    return given


def image_to_video(name: str) -> tuple[nn.Module, dict]:
    """Variants with an image beside the prompt, and a call of them."""
    torch.manual_seed(0)
    if name == "hunyuan":
        model = diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=False,
            text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
            image_condition_type="token_replace",
        )  # fmt: skip
        given = inputs("hunyuan")
        given["encoder_attention_mask"][:] = True
        return sharpened(model), given
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=8, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
        qk_norm="rms_norm_across_heads", image_dim=6, added_kv_proj_dim=24,
    )  # fmt: skip
    time = torch.full((2,), 500)
    if name != "wan":  # as Wan 2.2 5B: the first frame is given, and clean
        time = torch.full((2, 192), 500)
        time[:, :64] = 0
    given = {
        "hidden_states": torch.randn(2, 8, 3, 16, 16),
        "timestep": time,
        "encoder_hidden_states": torch.randn(2, 512, 16),
        "encoder_hidden_states_image": torch.randn(2, 5, 6),
    }
    return sharpened(model), given


def pipeline(name: str) -> tuple[diffusers.DiffusionPipeline, dict]:
    """A pipeline of HunyuanVideo or CogVideoX around the tiny model, and a call with ready embeddings."""
    torch.manual_seed(0)
    given = inputs("hunyuan" if name == "hunyuan" else "cogvideox", batch=2)
    prompt = given["encoder_hidden_states"]
    if name == "hunyuan":
        vae = diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        )
        pipe = diffusers.HunyuanVideoPipeline(
            text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, vae=vae.eval(),
            transformer=hunyuan(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        )  # fmt: skip
        return pipe, {
            "prompt_embeds": prompt[1:], "prompt_attention_mask": given["encoder_attention_mask"][1:],
            "pooled_prompt_embeds": given["pooled_projections"][1:], "height": 128, "width": 128,
            "num_frames": 9,
        }  # fmt: skip
    vae = diffusers.AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    )
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=vae.eval(), scheduler=diffusers.DDIMScheduler(),
        transformer=MODELS[name](),
    )  # fmt: skip
    return pipe, {
        "prompt_embeds": prompt[:1], "negative_prompt_embeds": prompt[1:], "height": 128, "width": 128,
        "num_frames": 9 if name == "cogvideox" else 13, "guidance_scale": 6.0,
    }  # fmt: skip


MODELS = {
    "wan": wan,
    "hunyuan": hunyuan,
    "cogvideox": cogvideox,
    "cogvideox-1.5": lambda: cogvideox(rotary=True),
}
GRIDS = {"wan": (3, 8, 8), "hunyuan": (3, 8, 8), "cogvideox": (3, 8, 8), "cogvideox-1.5": (2, 8, 8)}
TEXT = {"wan": 0, "hunyuan": 20, "cogvideox": 20, "cogvideox-1.5": 20}
LAYERS = {"wan": 3, "hunyuan": 4, "cogvideox": 2, "cogvideox-1.5": 2}


def call(model: torch.nn.Module, given: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**given, return_dict=False)[0]


def assert_near(out: torch.Tensor, ref: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Equal but for the rounding of one attention kernel or another, a few layers on."""
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(out, ref, atol=tolerance * float(ref.abs().max()), rtol=0)


def generate(model, name, steps=5, passes=2, first=900):
    """The outputs of every pass of every step, with the timestep going down."""
    return [
        call(model, inputs(name, timestep=first - 100 * step) | {"encoder_hidden_states": text})
        for step in range(steps)
        for text in [
            inputs(name)["encoder_hidden_states"] * (1 if number == 0 else 0.1) for number in range(passes)
        ]
    ]
