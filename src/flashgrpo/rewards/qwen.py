"""What rewards on Qwen2-VL share: a language model reads pictures and a text; a head scores it at tokens of the text.

The two that are released (HPSv3, VideoAlign) read with the positions of plain text, 0, 1, 2, ..., over the tokens of a
picture too: their authors' code embeds pictures by itself and so passes by the model's own three-dimensional positions.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from flashgrpo.distributed.world import current_device
from flashgrpo.errors import UserError, first_line
from flashgrpo.models.weights import linear_layers, load_tensors

Frames = Float[Tensor, "frames 3 height width"]
DTYPES = ("bfloat16", "float16", "float32")
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures, as in Qwen2-VL's own image processor
STD = (0.26862954, 0.26130258, 0.27577711)
# Qwen2-VL's chat template for one user's message, with the generation prompt
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
BETWEEN, AFTER = "<|vision_end|>", "<|im_end|>\n<|im_start|>assistant\n"


class QwenReward:
    """A Qwen2-VL without its vocabulary head, and a reward head on its last hidden states.

    Args:
        base: the Qwen2-VL that it was tuned from, folder or hub id; its configuration and tokenizer are read.
        tensors: all weights, named as by transformers 4 or 5, and those of the head, `rm_head.*`.
        tokens: the reward tokens, which the tokenizer does not know yet, in the order of their ids.
        outputs: how many the head may have.
        dtype: of the backbone; the head computes in float32.

    Raises:
        UserError: `tensors` are not those of this base.
    """

    def __init__(
        self, base: str, tensors: Mapping[str, Tensor], tokens: Sequence[str], outputs: Sequence[int], dtype: str
    ) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoTokenizer, Qwen2VLModel, utils

        if dtype not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        utils.logging.set_verbosity_error()
        config: Any = AutoConfig.from_pretrained(base)
        if config.model_type != "qwen2_vl":
            raise UserError(f"{base} is a {config.model_type}, not a Qwen2-VL")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)
        self.tokenizer.padding_side = "right"
        self.tokenizer.add_tokens(list(tokens), special_tokens=True)
        config.text_config.vocab_size = len(self.tokenizer)
        with init_empty_weights(include_buffers=False):
            model: Any = Qwen2VLModel(config)
        device, weights = current_device(), getattr(torch, dtype)
        backbone = {_name(n): t for n, t in tensors.items() if not n.startswith(("lm_head.", "rm_head."))}
        load_tensors(model, {n: t.to(device, weights) for n, t in backbone.items()}, f"it, as a tuned {base},")
        # Buffers are cast too: so do both authors, and their weights know rotary frequencies as bfloat16 rounds them.
        self.model: Any = model.to(device, weights).eval().requires_grad_(False)
        self.tokens = torch.tensor(self.tokenizer.convert_tokens_to_ids(list(tokens)), device=device)
        self.head = _head({n: t.to(device, torch.float32) for n, t in tensors.items() if n.startswith("rm_head.")})
        if self.head[-1].out_features not in outputs:
            raise UserError(f"its head has {self.head[-1].out_features} outputs, not {' or '.join(map(str, outputs))}")

    @torch.no_grad()
    def __call__(
        self, template: str, prompts: Sequence[str], pictures: Sequence[Frames], kind: Literal["image", "video"]
    ) -> Float[Tensor, "rows tokens outputs"]:
        """Return what the head says at each reward token, in the order of the text, on the CPU.

        Args:
            template: the text after the picture, with the reward tokens in it and `{text_prompt}` for the prompt.
            pictures: one for each prompt, in [0, 1], already of a size that `fitted` gives; an image is one frame.

        Raises:
            ValueError: a prompt contains one of the model's own tokens, which would be read as more than text.
        """
        own = [token for token in self.tokenizer.get_added_vocab() if any(token in prompt for prompt in prompts)]
        if own:
            raise ValueError(f"a prompt contains {own[0]}, a token of the reward model's own; take it out")
        cut, grids = zip(*(self._patches(frames.to(self.model.device)) for frames in pictures), strict=True)
        counts = [math.prod(grid) // self.merge**2 for grid in grids]
        texts = [
            BEFORE + f"<|{kind}_pad|>" * count + BETWEEN + template.replace("{text_prompt}", prompt) + AFTER
            for count, prompt in zip(counts, prompts, strict=True)
        ]
        inputs = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.model.device)
        ids = inputs["input_ids"]
        pixels = {"image": "pixel_values", "video": "pixel_values_videos"}[kind]
        hidden = self.model(
            input_ids=ids,
            attention_mask=inputs["attention_mask"],
            position_ids=torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape),
            use_cache=False,
            **{pixels: torch.cat(cut), f"{kind}_grid_thw": torch.tensor(grids, device=ids.device)},
        ).last_hidden_state
        return self.head(hidden[torch.isin(ids, self.tokens)].float()).unflatten(0, (len(texts), -1)).cpu()

    @property
    def merge(self) -> int:
        """Patches along a side that become one token."""
        return int(self.model.config.vision_config.spatial_merge_size)

    def fitted(
        self, frames: Frames, low: int, high: int, like: Literal["PIL", "torchvision"]
    ) -> Float[Tensor, "frames 3 fitted_height fitted_width"]:
        """Frames resized to at most `high`, else at least `low` pixels, to sides that the model takes.

        Bicubic, antialiased, to whole 8-bit levels. PIL rounds after the rows and after the columns, torchvision once.

        Raises:
            ValueError: one side is more than 200 times the other.
        """
        height, width = frames.shape[-2:]
        if max(height, width) > 200 * min(height, width):
            raise ValueError(
                f"frames of {height} x {width} are no picture to Qwen2-VL: one side is over 200 times the other"
            )
        unit = int(self.model.config.vision_config.patch_size) * self.merge
        size = [max(unit, round(side / unit) * unit) for side in (height, width)]
        if math.prod(size) > high:
            size = [math.floor(side / math.sqrt(height * width / high) / unit) * unit for side in (height, width)]
        elif math.prod(size) < low:
            size = [math.ceil(side * math.sqrt(low / (height * width)) / unit) * unit for side in (height, width)]
        size = [max(unit, side) for side in size]
        levels = (frames.clamp(0, 1) * 255).round()
        for target in [[height, size[1]], size] if like == "PIL" else [size]:
            levels = nn.functional.interpolate(levels, target, mode="bicubic", antialias=True).clamp(0, 255).round()
        return levels / 255

    def _patches(self, frames: Frames) -> tuple[Float[Tensor, "patches values"], tuple[int, int, int]]:
        """Patches of two frames each, in the order of the vision tower, and how many along time, height and width.

        An image is its frame twice; of a video with an odd number of frames the last one comes twice.
        """
        frames = torch.cat([frames, frames[-1:]]) if len(frames) % 2 else frames
        mean, std = (frames.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        patch, merge = int(self.model.config.vision_config.patch_size), self.merge
        time, height, width = len(frames) // 2, frames.shape[-2] // patch, frames.shape[-1] // patch
        cut = ((frames - mean) / std).view(time, 2, 3, height // merge, merge, patch, width // merge, merge, patch)
        order = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # the patches of a token lie together
        return order.reshape(time * height * width, -1), (time, height, width)


def checkpoint_folder(path: str, files: list[str]) -> Path:
    """Find a folder as it is, or these files of a hub repository."""
    from huggingface_hub import snapshot_download

    return Path(path if Path(path).is_dir() else snapshot_download(path, allow_patterns=files))


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn whatever a missing or foreign file raises in here into one sentence."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, UnpicklingError) as error:
        raise UserError(f"{what} could not be loaded: {first_line(error)[:200]}") from error


def _name(name: str) -> str:
    """Return a weight's name in `Qwen2VLModel`: up to transformers 4.51 `model` was the language model, now both."""
    name = name if name.startswith("visual.") else name.removeprefix("model.")
    return name if name.startswith(("visual.", "language_model.")) else f"language_model.{name}"


def _head(tensors: Mapping[str, Tensor]) -> nn.Sequential:
    """Linear layers, rectified between, of `rm_head.weight` or `rm_head.N.weight`, with biases where there are any."""
    linear = linear_layers(tensors, any(name.endswith(".bias") for name in tensors), "it")
    layers = [part for layer in linear for part in (nn.ReLU(), layer)][1:]
    if not layers:
        raise UserError("it has no reward head, rm_head.*")
    return nn.Sequential(*layers).requires_grad_(False)
