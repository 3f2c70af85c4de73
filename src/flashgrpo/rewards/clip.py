"""Rewards by CLIP: how well frames fit their prompt, how people would rank them, how they look.

Each loads from a local folder or a hub id when it is made. Frames go through the model's own image processor.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flashgrpo.distributed.world import current_device
from flashgrpo.errors import UserError, first_line
from flashgrpo.models.weights import linear_layers, load_network
from flashgrpo.rewards.frames import pick
from flashgrpo.video import to_pictures


class ClipScore:
    """Cosine between the embeddings of frame and prompt, mean over frames (arXiv 2104.08718, without its factor).

    `reward(videos, prompts)` of (B, F, 3, H, W) in [0, 1] gives (B,) in [-1, 1], usually 0.2 to 0.35. Texts are cut at
    77 tokens. Gamed by pictures of the words and by oversaturated stills; it does not see motion.

    Args:
        path: a CLIP checkpoint, folder or hub id.
        frames: looked at, spread evenly over the video.

    Raises:
        UserError: the checkpoint is not there, or is none of CLIP's.
    """

    score_range = (-1.0, 1.0)

    def __init__(self, path: str = "openai/clip-vit-large-patch14", frames: int = 4) -> None:
        self._clip = Clip(path, path, frames)

    def __call__(self, videos: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        return self._clip.cosines(videos, prompts).mean(dim=1)


class PickScore:
    """The score of a CLIP model tuned on people's choices: `exp(logit_scale) cos`, mean over frames (arXiv 2305.01569).

    `reward(videos, prompts)` of (B, F, 3, H, W) in [0, 1] gives (B,), usually 18 to 24. Gamed by saturated, detailed
    stills; it does not see motion.

    Args:
        path: the checkpoint, folder or hub id.
        processor: where its image processor and tokenizer lie, which the checkpoint does not ship.
        frames: looked at, spread evenly over the video.

    Raises:
        UserError: the checkpoint is not there, or is none of CLIP's.
    """

    score_range = (None, None)

    def __init__(
        self,
        path: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        frames: int = 4,
    ) -> None:
        self._clip = Clip(path, processor, frames)

    def __call__(self, videos: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        return self._clip.temperature * self._clip.cosines(videos, prompts).mean(dim=1)


class Aesthetic:
    """LAION's aesthetic predictor: linear layers on CLIP's image embedding, mean over frames.

    `reward(videos, prompts)` of (B, F, 3, H, W) in [0, 1] gives (B,), 1 to 10, usually 4.5 to 6.5. Gamed by painterly,
    saturated, centred pictures; it sees neither prompt nor motion.

    Args:
        head: .safetensors file with the layers' weights: `linear.weight` of the first predictor, or `layers.N.weight`
            of the improved one, applied in the order of N. What is released is a pickle; docs/rewards.md converts it.
        path: the CLIP checkpoint that the head was made for.
        frames: looked at, spread evenly over the video.

    Raises:
        UserError: the checkpoint or the head is not there, or they do not fit each other.
    """

    score_range = (1.0, 10.0)

    def __init__(self, head: str, path: str = "openai/clip-vit-large-patch14", frames: int = 4) -> None:
        self._clip = Clip(path, path, frames)
        self._layers = _head(head, self._clip.model.device)
        takes, gives = self._layers[0].in_features, self._clip.model.config.projection_dim
        if takes != gives:
            raise UserError(f"{head} takes embeddings of width {takes}, and {path} gives {gives}")

    def __call__(self, videos: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        values = self._clip.images(videos)
        for layer in self._layers:
            values = layer(values)
        return values[..., 0].mean(dim=1).cpu()


class Clip:
    """A CLIP checkpoint on the device that the process computes on, and the frames that it looks at."""

    def __init__(self, path: str, processor: str, frames: int) -> None:
        from transformers import CLIPModel, CLIPProcessor, utils

        utils.logging.set_verbosity_error()
        utils.logging.disable_progress_bar()
        model: Any = load_network(CLIPModel, path, f"the CLIP model {path}")
        try:
            self._prepare = CLIPProcessor.from_pretrained(processor)
        except Exception as error:  # of kinds of transformers, tokenizers and the hub's client
            raise UserError(f"the processor {processor} could not be loaded: {first_line(error)[:200]}") from error
        self.model = model.eval().requires_grad_(False).to(current_device())
        self.temperature = float(self.model.logit_scale.exp())
        self._frames = frames

    @torch.no_grad()
    def images(self, videos: Tensor) -> Float[Tensor, "batch frames width"]:
        """Unit embeddings of the frames looked at, on the device."""
        picked = [pick(video, self._frames) for video in videos]
        pictures = [picture for video in picked for picture in to_pictures(video)]
        return self.pictures(pictures).unflatten(0, (len(picked), -1))

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Any]) -> Float[Tensor, "pictures width"]:
        """Unit embeddings of pictures of any sizes, on the device."""
        inputs = self._prepare(images=list(pictures), return_tensors="pt").to(self.model.device)
        return _unit(self.model.get_image_features(**inputs))

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Float[Tensor, "texts width"]:
        """Unit embeddings of texts, cut at 77 tokens, on the device."""
        tokens = self._prepare(text=texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        return _unit(self.model.get_text_features(**tokens.to(self.model.device)))

    def cosines(self, videos: Tensor, prompts: list[str]) -> Float[Tensor, "batch frames"]:
        """Return the cosine of each frame looked at with its video's prompt, on the CPU."""
        return (self.images(videos) * self.texts(prompts)[:, None]).sum(dim=-1).cpu()


def _unit(features: Any) -> Float[Tensor, "rows width"]:
    """transformers gives the projected embedding, or from release 5 on an output that holds it as `pooler_output`."""
    embeddings = features if isinstance(features, Tensor) else features.pooler_output
    return nn.functional.normalize(embeddings.float(), dim=-1)


def _head(file: str, device: torch.device) -> list[nn.Linear]:
    """Return the linear layers, in order."""
    try:
        tensors = {name: tensor.float().to(device) for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"the aesthetic head {file} could not be read: {first_line(error)[:200]}") from error
    layers = linear_layers(tensors, True, f"the aesthetic head {file}")
    if not layers or layers[-1].out_features != 1:
        raise UserError(f"the aesthetic head {file} has no last layer with one output")
    return layers
