"""URSA: images and videos as tokens, by uniform discrete diffusion over a Qwen3 (arXiv 2510.24717).

| checkpoint | what it draws | here |
|---|---|---|
| BAAI/URSA-1.7B-IBQ512, -IBQ1024, URSA-0.6B-IBQ1024 | images, 16 x 16 pixels a code | drawn, decoded, trained |
| BAAI/URSA-1.7B-FSQ320, URSA-0.6B-FSQ320 | videos, 4 x 8 x 8 a code | the same |

A folder has `transformer`, `vae`, `scheduler` and `tokenizer`; its own code is not run. What is trained is written as
that code and peft read it.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from flashgrpo.distributed.live import highest
from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError
from flashgrpo.models.architectures import checked_size
from flashgrpo.models.conditions import fingerprint
from flashgrpo.models.settings import ModelConfig
from flashgrpo.models.token_network import TokenNetwork
from flashgrpo.models.ursa.checkpoint import (
    WEIGHTS,
    Ursa,
    load_decoder,
    load_network,
    load_tokenizer,
    read_codes,
)
from flashgrpo.models.ursa.network import places_of
from flashgrpo.models.warm_start import adapters_identity
from flashgrpo.processes.tokens.model import Read, Tokens
from flashgrpo.seeds import keyed_bits
from flashgrpo.types import Condition, Prompt, Videos, to_device


class UrsaModel(TokenNetwork):
    """A checkpoint of URSA as a `UniformModel`.

    Args:
        settings: of its components.
        folder: the checkpoint; None for random weights.

    Raises:
        UserError: the size is none of its images, a component is missing, or components do not belong together.
    """

    mask: int | None = None
    end: int | None = None

    def __init__(
        self,
        settings: Ursa,
        folder: Path | None,
        config: ModelConfig,
        world: World,
        seed: int,
        keep_reference: bool = False,
    ) -> None:
        self.settings, self.folder = settings, folder
        self.path, self.shift = settings.path, float(settings.scheduler["shift"])
        self.vocabulary: int = settings.transformer["lm_head_size"]
        self.grid = _grid(settings, config)
        self.length = self.grid[0] * self.grid[1] * self.grid[2]
        self.tokenizer = None if folder is None else load_tokenizer(folder, settings)
        self.codes = to_device(read_codes(settings, folder, seed), world.device)
        decoder = load_decoder(settings, folder, getattr(torch, config.vae_dtype), world)
        if self.grid[0] > decoder.frames:
            most = (decoder.frames - 1) * settings.vae["temporal_stride"] + 1
            raise UserError(f"model.num_frames: the decoder of {config.path} makes {most} frames at most")
        network = load_network(settings, folder, getattr(torch, config.dtype), world)
        self.places = to_device(places_of(config.max_sequence_length, *self.grid), world.device)
        super().__init__(network, config, world, seed, keep_reference)
        self.decoder = decoder

    @property
    def identity(self) -> str:
        """A digest of samples from the checkpoint's weights, or of the sizes where weights are random."""
        if self.folder is None:
            return fingerprint(Path(), [], {"random": repr(self.settings)})
        return fingerprint(self.folder, ["transformer", "vae", "scheduler"], {}) + adapters_identity(self.config)

    # Prompts

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Return {"text": (B, P)} with P = `max_sequence_length`: ids, padded on the left, and cut off on the right."""
        length = self.config.max_sequence_length
        pad = 0 if self.tokenizer is None else self.tokenizer.pad_token_id
        rows = [self._ids(prompt.text)[:length] for prompt in prompts]
        padded = [[pad] * (length - len(ids)) + ids for ids in rows]
        ids = torch.tensor(padded, dtype=torch.int64).view(len(rows), length)
        return Condition({"text": to_device(ids, self.device)})

    def nothing(self) -> Condition:
        """Return the condition of an empty prompt, one row."""
        return self.encode([Prompt("", {})])

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text; 0 where there is no tokenizer."""
        return [0 if self.tokenizer is None else len(self._ids(text)) for text in texts]

    def _ids(self, text: str) -> list[int]:
        if self.tokenizer is None:
            return [keyed_bits("word", word) % self.settings.transformer["bov_token_id"] for word in text.split()]
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    # The network

    def call(self, tokens: Tokens, condition: Condition, read: Read) -> Tensor:
        """Call the network on B rows of codes behind their texts; see `TokenModel`."""
        result: Tensor = self.network(condition.tensors["text"], tokens, self.places, read)
        return result

    @torch.no_grad()
    def decode(self, tokens: Tokens, frames: int | None = None) -> Videos:
        """Return videos (B, F, 3, H, W) in [0, 1], images as videos of one frame; all frames are decoded together."""
        pictures = self.decoder(tokens.view(-1, *self.grid)).float()[:, :frames]
        return (pictures / 2 + 0.5).clamp(0, 1)

    def decoding_bytes(self, samples: int) -> int:
        """Count the bytes at the highest of decoding so many samples, of a model on the meta device."""
        tokens = torch.zeros(samples, self.length, dtype=torch.int64, device=self.device)
        return highest(lambda: self.decode(tokens), [tokens, *self.decoder.parameters()])

    # Getting the result out

    def _save_whole(self, folder: Path) -> None:
        """Write the transformer, and copy the other components, which are not trained."""
        for part in self.folder.iterdir() if self.folder else ():
            if part.is_dir() and part.name != "transformer":
                shutil.copytree(part, folder / part.name, dirs_exist_ok=True)
            elif part.is_file():
                shutil.copy(part, folder / part.name)
        (own := folder / "transformer").mkdir(exist_ok=True)
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.network.state_dict().items()}
        save_file(tensors, own / WEIGHTS.replace("*", ""), metadata={"format": "pt"})
        text = json.dumps(dict(self.settings.transformer), indent=2)
        (own / "config.json").write_text(text + "\n", encoding="utf-8")


def _grid(settings: Ursa, config: ModelConfig) -> tuple[int, int, int]:
    """Return frames, rows and columns of codes."""
    stride = settings.vae["temporal_stride"]
    if stride == 1 and config.num_frames != 1:
        raise UserError(f"model.num_frames: {config.path} draws images; take 1, not {config.num_frames}")
    multiple = settings.vae["spatial_stride"]
    return checked_size(config, multiple, stride), config.height // multiple, config.width // multiple
