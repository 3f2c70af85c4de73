"""ImageReward: what people would prefer, by BLIP with a head on its text encoder, through transformers alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flashgrpo.distributed.world import current_device
from flashgrpo.errors import UserError
from flashgrpo.models.weights import linear_layers, load_tensors
from flashgrpo.rewards.frames import pick
from flashgrpo.rewards.qwen import checkpoint_folder, loading
from flashgrpo.types import Videos
from flashgrpo.video import to_pictures

FILE = "ImageReward.pt"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's outputs over the training set, by the authors' code
LENGTH = 35  # tokens of a text
HEAD_WIDTH = 64  # of an attention head, in BLIP's image and text encoders of any size
VISION = (  # names of the released image encoder -> transformers' BLIP
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("blocks.", "encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
)


class ImageReward:
    """Score of a frame with its prompt by ImageReward (arXiv 2304.05977), mean over frames.

    The released weights have not been loaded here, as no hub could be reached: computation, sizes and names of the
    weights are those of the authors' code. The tests use tiny random weights in that layout.

    Args:
        path: the file ImageReward.pt (1.8 GB), its folder, or a hub id. It is read as tensors alone: nothing runs.
        tokenizer: of BERT, uncased: folder or hub id.
        frames: looked at, spread evenly over the video; of one, the first.

    Returns:
        (B,) for videos (B, F, 3, H, W) in [0, 1]: standardised, usually -2 to 2. Texts are cut at 35 tokens, and of a
        frame the middle square is seen. Gamed by saturated, detailed stills; it does not see motion.

    Raises:
        UserError: the checkpoint is missing or another.
    """

    score_range: tuple[float | None, float | None] = (None, None)

    def __init__(
        self, path: str = "THUDM/ImageReward", tokenizer: str = "google-bert/bert-base-uncased", frames: int = 4
    ) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessor

        with loading(f"the ImageReward checkpoint {path}"):
            file = Path(path) if Path(path).is_file() else checkpoint_folder(path, [FILE]) / FILE
            tensors = torch.load(file, map_location="cpu", weights_only=True)
            self._vision, self._text, self._head = networks(tensors)
        with loading(f"the tokenizer {tokenizer}"):
            self._tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        places = self._text.config.vocab_size
        if len(self._tokenizer) > places:
            raise UserError(f"the tokenizer {tokenizer} has {len(self._tokenizer)} tokens, and ImageReward {places}")
        side = self._vision.config.image_size
        self._prepare = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        self._frames = frames

    @torch.no_grad()
    def __call__(self, videos: Videos, prompts: list[str], **columns: Any) -> Float[Tensor, " batch"]:
        """Score the videos, (B,)."""
        device = self._vision.device
        tokens = self._tokenizer(prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        scores = []
        for video, ids, mask in zip(videos, tokens.input_ids, tokens.attention_mask, strict=True):
            pictures = list(to_pictures(pick(video, self._frames)))
            seen = self._vision(self._prepare(pictures, return_tensors="pt").pixel_values.to(device)).last_hidden_state
            count = len(pictures)
            told = {"input_ids": ids.expand(count, -1), "attention_mask": mask.expand(count, -1)}
            states = self._text(
                **{name: value.to(device) for name, value in told.items()}, encoder_hidden_states=seen
            ).last_hidden_state
            scores.append((self._head(states[:, 0]) - MEAN) / STD)
        return torch.stack([score.mean() for score in scores]).cpu()


def networks(tensors: Mapping[str, Tensor]) -> tuple[Any, Any, nn.Module]:
    """Return image encoder, text encoder and head of a checkpoint's tensors; its sizes are read from their shapes.

    Raises:
        UserError: weights are missing, or of other shapes.
        KeyError: it is another checkpoint.
    """
    from accelerate import init_empty_weights
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision = {_in_blip(key): tensor.float() for key, tensor in _below(tensors, "blip.visual_encoder.").items()}
    text = {key: tensor for key, tensor in _below(tensors, "blip.text_encoder.").items() if tensor.is_floating_point()}
    patches, width = vision["embeddings.position_embedding"].shape[1:]
    patch = vision["embeddings.patch_embedding.weight"].shape[-1]
    vision_config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(vision["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=_layers(vision, "encoder.layers."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=round((patches - 1) ** 0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    vocabulary, hidden = text["embeddings.word_embeddings.weight"].shape
    text_config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        encoder_hidden_size=width,
        intermediate_size=len(text["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_layers(text, "encoder.layer."),
        num_attention_heads=hidden // HEAD_WIDTH,
        max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
    )
    with init_empty_weights(include_buffers=False):
        parts: tuple[Any, Any] = BlipVisionModel(vision_config), BlipTextModel(text_config, add_pooling_layer=False)
    for part, own in zip(parts, (vision, text), strict=True):
        load_tensors(part, {key: tensor.float() for key, tensor in own.items()}, "it")
    head = nn.Sequential(*linear_layers(_below(tensors, "mlp."), True, "it"))
    whole = [part.eval().requires_grad_(False).to(current_device()) for part in (*parts, head)]
    return whole[0], whole[1], whole[2]


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).partition(".")[0] for key in tensors if key.startswith(prefix)})


def _in_blip(name: str) -> str:
    if name.startswith("norm."):
        return f"post_layer{name}"
    for released, own in VISION:
        name = name.replace(released, own)
    return name
