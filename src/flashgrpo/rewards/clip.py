"""Rewards by CLIP: how well frames fit their prompt, how people would rank them, how they look.

Each loads from a local folder or a hub id, once for a process, onto the device that the process computes on. Frames go
through the model's own image processor.
"""

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flashgrpo.distributed import current_device
from flashgrpo.errors import UserError
from flashgrpo.explain import first_line
from flashgrpo.rewards.frames import pick

Embeddings = Float[Tensor, "rows width"]


def clip_score(
    videos: Tensor,
    prompts: list[str],
    path: str = "openai/clip-vit-large-patch14",
    frames: int = 4,
    **columns: Any,
) -> Tensor:
    """Cosine between the embeddings of frame and prompt, mean over frames (arXiv 2104.08718, without its factor).

    Args:
        videos: (B, F, 3, H, W) in [0, 1].
        path: a CLIP checkpoint, folder or hub id.
        frames: looked at, spread evenly over the video.

    Returns:
        (B,) in [-1, 1], usually 0.2 to 0.35. Texts are cut at 77 tokens. Gamed by pictures of the words and by
        oversaturated stills; it does not see motion.
    """
    images, texts, _ = _embed(videos, prompts, path, frames)
    return (images * texts[:, None]).sum(dim=-1).mean(dim=1).cpu()


def pick_score(
    videos: Tensor,
    prompts: list[str],
    path: str = "yuvalkirstain/PickScore_v1",
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    frames: int = 4,
    **columns: Any,
) -> Tensor:
    """The score of a CLIP model tuned on people's choices: `exp(logit_scale) cos`, mean over frames (arXiv 2305.01569).

    Args:
        videos: (B, F, 3, H, W) in [0, 1].
        path: the checkpoint, folder or hub id.
        processor: where its image processor and tokenizer lie, which the checkpoint does not ship.
        frames: looked at, spread evenly over the video.

    Returns:
        (B,), usually 18 to 24. Gamed by saturated, detailed stills; it does not see motion.
    """
    images, texts, scale = _embed(videos, prompts, path, frames, processor)
    return scale * (images * texts[:, None]).sum(dim=-1).mean(dim=1).cpu()


def aesthetic(
    videos: Tensor,
    prompts: list[str],
    head: str,
    path: str = "openai/clip-vit-large-patch14",
    frames: int = 4,
    **columns: Any,
) -> Tensor:
    """LAION's aesthetic predictor: linear layers on CLIP's image embedding, mean over frames.

    Args:
        videos: (B, F, 3, H, W) in [0, 1].
        head: .safetensors file with the layers' weights: `linear.weight` of the first predictor, or `layers.N.weight`
            of the improved one, applied in the order of N. What is released is a pickle; docs/rewards.md converts it.
        path: the CLIP checkpoint that the head was made for.
        frames: looked at, spread evenly over the video.

    Returns:
        (B,), 1 to 10, usually 4.5 to 6.5. Gamed by painterly, saturated, centred pictures; it sees neither prompt nor
        motion.
    """
    images, _, _ = _embed(videos, None, path, frames)
    values = images
    for weight, bias in _head(head):
        if weight.shape[1] != values.shape[-1]:
            raise UserError(f"{head} takes embeddings of width {weight.shape[1]}, and {path} gives {values.shape[-1]}")
        values = nn.functional.linear(values, weight.to(values), bias.to(values))
    return values[..., 0].mean(dim=1).cpu()


@torch.no_grad()
def _embed(
    videos: Tensor, prompts: list[str] | None, path: str, frames: int, processor: str | None = None
) -> tuple[Float[Tensor, "batch frames width"], Embeddings, float]:
    """Unit embeddings of the picked frames and of the prompts, and the temperature of the model's logits."""
    model, prepare = _load(path, processor or path, current_device())
    picked = [pick(video, frames) for video in videos]
    pictures = [frame.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy() for v in picked for frame in v]
    inputs = prepare(images=pictures, return_tensors="pt").to(model.device)
    images = _unit(model.get_image_features(**inputs)).unflatten(0, (len(picked), -1))
    texts = torch.empty(0, images.shape[-1])
    if prompts is not None:
        tokens = prepare(text=prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        texts = _unit(model.get_text_features(**tokens.to(model.device)))
    return images, texts, float(model.logit_scale.exp())


def _unit(features: Any) -> Embeddings:
    """transformers gives the projected embedding, or from release 5 on an output that holds it as `pooler_output`."""
    embeddings = features if isinstance(features, Tensor) else features.pooler_output
    return nn.functional.normalize(embeddings.float(), dim=-1)


@lru_cache(maxsize=4)
def _load(path: str, processor: str, device: torch.device) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor, utils

    utils.logging.set_verbosity_error()
    try:
        model: Any = CLIPModel.from_pretrained(path)
        return model.eval().requires_grad_(False).to(device), CLIPProcessor.from_pretrained(processor)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the CLIP model {path} could not be loaded: {first_line(error)[:200]}") from error


@lru_cache(maxsize=4)
def _head(file: str) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of each linear layer, in order."""
    try:
        tensors = load_file(file)
        names = [name.removesuffix("weight") for name in tensors if name.endswith("weight")]
        names.sort(key=lambda name: [int(part) if part.isdigit() else 0 for part in name.split(".")])
        return [(tensors[f"{name}weight"].float(), tensors[f"{name}bias"].float()) for name in names]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"the aesthetic head {file} could not be read: {first_line(error)[:200]}") from error
