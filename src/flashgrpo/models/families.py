"""The families of flow models: which pipeline of diffusers each is, and what is refused on purpose.

This is the only list: loading, the sentences that refuse a checkpoint, and the tables in README and docs read it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashgrpo.processes.flow.choices import GuidanceKind


@dataclass(frozen=True)
class Family:
    """A family of checkpoints.

    Args:
        name: as people call it.
        module, model: the file below `models/` and the class in it.
        makes: what of what.
        encoders: of prompts.
        guidance: in words, for the table.
    """

    name: str
    module: str
    model: str
    makes: str
    encoders: str
    guidance: str


FAMILIES: Mapping[str, Family] = {
    "WanPipeline": Family("Wan 2.1, 2.2", "wan", "WanModel", "text to video", "UMT5", "classifier-free"),
    "WanImageToVideoPipeline": Family(
        "Wan 2.1, 2.2 I2V, 2.1 FLF2V",
        "wan",
        "WanModel",
        "first image, or first and last, to video",
        "UMT5, CLIP vision",
        "classifier-free",
    ),
    "SkyReelsV2Pipeline": Family("SkyReels-V2", "wan", "WanModel", "text to video", "UMT5", "classifier-free"),
    "SkyReelsV2ImageToVideoPipeline": Family(
        "SkyReels-V2 I2V", "wan", "WanModel", "image to video", "UMT5, CLIP vision", "classifier-free"
    ),
    "LTXPipeline": Family("LTX-Video", "ltx", "LtxModel", "text to video", "T5", "classifier-free"),
    "LTX2Pipeline": Family("LTX-2", "ltx2", "Ltx2Model", "text to video and sound", "Gemma 3", "classifier-free"),
    "HunyuanVideo15Pipeline": Family(
        "HunyuanVideo-1.5",
        "hunyuan",
        "HunyuanModel",
        "text to video",
        "Qwen2.5-VL, ByT5",
        "classifier-free, none (distilled), by its guider",
    ),
    "HunyuanVideo15ImageToVideoPipeline": Family(
        "HunyuanVideo-1.5 I2V",
        "hunyuan",
        "HunyuanModel",
        "image to video",
        "Qwen2.5-VL, ByT5, SigLIP",
        "classifier-free, none (distilled), by its guider",
    ),
    "StableDiffusion3Pipeline": Family(
        "Stable Diffusion 3.5", "sd3", "Sd3Model", "text to image", "CLIP L, CLIP G, T5", "classifier-free"
    ),
    "FluxPipeline": Family(
        "FLUX.1", "flux", "FluxModel", "text to image", "CLIP L, T5", "embedded (dev), none (schnell)"
    ),
    "FluxKontextPipeline": Family(
        "FLUX.1 Kontext", "flux_kontext", "FluxKontextModel", "image and text to image", "CLIP L, T5", "embedded"
    ),
    "Flux2KleinPipeline": Family(
        "FLUX.2 klein", "flux2", "Flux2KleinModel", "text to image", "Qwen3", "classifier-free (base), none (distilled)"
    ),
    "QwenImagePipeline": Family(
        "Qwen-Image", "qwen_image", "QwenImageModel", "text to image", "Qwen2.5-VL", "classifier-free, of kept length"
    ),
    "ZImagePipeline": Family(
        "Z-Image", "z_image", "ZImageModel", "text to image", "Qwen3", "classifier-free; 1 for Turbo"
    ),
    "SanaVideoPipeline": Family(
        "Sana-Video", "sana_video", "SanaVideoModel", "text to video", "Gemma 2", "classifier-free"
    ),
    "SanaPipeline": Family("Sana", "sana", "SanaModel", "text to image", "Gemma 2", "classifier-free"),
}
"""By the class that a checkpoint's model_index.json names."""

STREAMING: Mapping[str, Family] = {
    "AnyFlowFARPipeline": Family("AnyFlow-FAR", "causal_wan", "CausalWan", "text to streaming video", "UMT5", "none"),
}
"""Those that draw a video block by block, and nothing else; Wan's transformer may be trained to do so, too."""

REFUSED: Mapping[str, str] = {
    "SkyReelsV2DiffusionForcingPipeline": "each of its frames has a noise level of its own",
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": "each of its frames has a noise level of its own",
    "LTX2ImageToVideoPipeline": "its tokens have noise levels of their own",
    "Flux2Pipeline": "its texts go through a processor of images, which needs torchvision",
    "WanAnimatePipeline": "it needs a video of poses and one of faces beside each prompt",
    "Kandinsky5T2VPipeline": "its tokenizer needs torchvision",
    "Kandinsky5I2VPipeline": "its tokenizer needs torchvision",
    "QwenImageEditPipeline": "its processor needs torchvision",
    "QwenImageEditPlusPipeline": "its processor needs torchvision",
}
"""Pipelines that are left out on purpose, and why."""


def refusal(pipeline: str) -> str:
    """Say why a pipeline is not taken, and which are."""
    reason = f" ({REFUSED[pipeline]})" if pipeline in REFUSED else ""
    return f"{pipeline}, which is not supported{reason}; supported are {', '.join((*FAMILIES, *STREAMING))}"


def guidance_kind(pipeline: str, transformer: Mapping[str, Any], settings: Mapping[str, Any]) -> GuidanceKind:
    """Tell what a guidance scale does, from the settings of a pipeline's transformer and of itself and its guider."""
    if pipeline in STREAMING:
        return "none"
    if pipeline in ("FluxPipeline", "FluxKontextPipeline"):
        return "embedded" if transformer.get("guidance_embeds") else "none"
    guided = settings.get("enabled", True) and settings.get("guidance_scale") != 1
    return "none" if settings.get("is_distilled") or not guided else "classifier-free"


def table() -> str:
    """Return the families as a table of Markdown, and what is left out."""
    head = "| family | pipeline of diffusers | makes | text encoders | guidance |\n|---|---|---|---|---|\n"
    rows = [
        f"| {family.name} | `{pipeline}` | {family.makes} | {family.encoders} | {family.guidance} |"
        for pipeline, family in FAMILIES.items()
    ]
    left_out = "; ".join(f"`{pipeline}` ({reason})" for pipeline, reason in REFUSED.items())
    return head + "\n".join(rows) + f"\n\nLeft out on purpose: {left_out}."
