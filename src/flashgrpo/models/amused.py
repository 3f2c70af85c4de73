"""aMUSEd: images as tokens, filled in by a small U-ViT with a text's guidance (arXiv 2401.01808).

| checkpoint | tokens | here |
|---|---|---|
| amused/amused-256 | 16 x 16 | diffusers' `UVit2DModel` and `VQModel`, texts by CLIP-L/14 |
| amused/amused-512 | 32 x 32 | the same |

The pipeline of diffusers is deprecated; the classes of its parts are not, and only those are used. What is written is
the folder that `AmusedPipeline.from_pretrained` reads.
"""

import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import UVit2DModel, VQModel
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from flashgrpo.distributed.live import highest
from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError, first_line
from flashgrpo.models.architectures import checked_size, fill, read_settings
from flashgrpo.models.conditions import Conditions, Row, entries_of, fingerprint
from flashgrpo.models.settings import ModelConfig
from flashgrpo.models.token_network import TokenNetwork
from flashgrpo.models.warm_start import adapters_identity
from flashgrpo.models.weights import load_network
from flashgrpo.processes.tokens.model import Read, Tokens
from flashgrpo.seeds import normal
from flashgrpo.types import Condition, Prompt, Videos

AESTHETICS = 6.0
"""Score that images are conditioned on, as the pipeline does."""
TEXT_TOKENS = 77
_BLOCKS = 5
_VQVAE = {
    "act_fn": "silu",
    "block_out_channels": (128, 256, 256, 512, 768),
    "down_block_types": ("DownEncoderBlock2D",) * _BLOCKS,
    "up_block_types": ("UpDecoderBlock2D",) * _BLOCKS,
    "latent_channels": 64,
    "layers_per_block": 2,
    "num_vq_embeddings": 8192,
    "mid_block_add_attention": False,
    "lookup_from_codebook": True,
}


@dataclass(frozen=True)
class Parts:
    """The settings of a checkpoint's components.

    Raises:
        UserError: the vocabulary lacks the mask, or the codes of the decoder are not those of the network.
    """

    where: str
    transformer: Mapping[str, Any]
    vqvae: Mapping[str, Any]
    mask: int

    def __post_init__(self) -> None:
        if not self.codes <= self.mask < self.transformer["vocab_size"]:
            raise UserError(
                f"model.path: the scheduler of {self.where} has mask_token_id {self.mask}, which the transformer's "
                f"vocabulary of {self.transformer['vocab_size']} tokens, {self.codes} of them codes, lacks"
            )
        if self.codes != self.vqvae["num_vq_embeddings"]:
            raise UserError(
                f"model.path: the transformer of {self.where} has {self.codes} codes and its vqvae "
                f"{self.vqvae['num_vq_embeddings']}; they belong to different checkpoints"
            )

    @property
    def codes(self) -> int:
        """Tokens that an image is made of."""
        return int(self.transformer["codebook_size"])

    @property
    def stride(self) -> int:
        """Pixels of a token's side."""
        return int(2 ** (len(self.vqvae["block_out_channels"]) - 1))


KNOWN = {
    "amused/amused-256": Parts(
        "amused/amused-256",
        {
            "codebook_size": 8192,
            "vocab_size": 8256,
            "sample_size": 16,
            "encoder_hidden_size": 768,
            "cond_embed_dim": 768,
        },
        _VQVAE,
        8255,
    )
}
"""By hub id: sizes, for random weights without a download; what they leave out is as diffusers' class has it."""


def read_parts(folder: Path) -> Parts:
    """Read the settings of a checkpoint's folder.

    Raises:
        UserError: a component is missing.
    """
    files = {"transformer": "config.json", "vqvae": "config.json", "scheduler": "scheduler_config.json"}
    found = {part: read_settings(folder / part / file) for part, file in files.items()}
    return Parts(str(folder), found["transformer"], found["vqvae"], int(found["scheduler"]["mask_token_id"]))


class AmusedModel(TokenNetwork):
    """A checkpoint of aMUSEd as a `TokenModel`. Texts are encoded before the network is loaded.

    Args:
        folder: the checkpoint; None for random weights.
        prompts: that will be asked for.

    Raises:
        UserError: the size is none of its images, or components are missing or do not belong together.
    """

    without = (
        *(name for name in TokenNetwork.without if name != "negative_prompt"),
        "length",
        "gradient_checkpointing",
    )
    encodes_first = True
    end: int | None = None

    def __init__(
        self,
        parts: Parts,
        folder: Path | None,
        config: ModelConfig,
        world: World,
        seed: int,
        keep_reference: bool = False,
        prompts: Sequence[Prompt] = (),
    ) -> None:
        self.parts, self.folder, self.seed = parts, folder, seed
        if config.num_frames != 1:
            raise UserError(f"model.num_frames: {config.path} draws images; take 1, not {config.num_frames}")
        checked_size(config, parts.stride, 1)
        self.config, self.device = config, world.device
        self.grid = config.height // parts.stride, config.width // parts.stride
        self.length, self.vocabulary = self.grid[0] * self.grid[1], parts.codes
        self.mask: int = parts.mask
        self._encoder: Any = None
        self._tokenizer = None if folder is None else _loaded(CLIPTokenizer, folder, "tokenizer", parts)
        self._conditions = Conditions(self._cache_folder(), self._row)
        self._encode_all(prompts, world)
        super().__init__(self._transformer(config, world), config, world, seed, keep_reference)
        self.decoder = self._vqvae(config, world)

    def _transformer(self, config: ModelConfig, world: World) -> Any:
        dtype = getattr(torch, config.dtype)
        if self.folder is None:
            return _random(UVit2DModel, self.parts.transformer, dtype, world)
        what = f"model.path: the transformer of {self.parts.where}"
        return load_network(UVit2DModel, self.folder / "transformer", what, dtype=dtype)

    def _vqvae(self, config: ModelConfig, world: World) -> Any:
        dtype = getattr(torch, "float32" if config.vae_dtype == "auto" else config.vae_dtype)
        if self.folder is None:
            network = _random(VQModel, self.parts.vqvae, dtype, world)
        else:
            what = f"model.path: the vqvae of {self.parts.where}"
            network = load_network(VQModel, self.folder / "vqvae", what, dtype=dtype)
        return network.requires_grad_(False).eval().to(world.device)

    @property
    def identity(self) -> str:
        """A digest of samples from the checkpoint's weights, or of the sizes where weights are random."""
        if self.folder is None:
            return fingerprint(Path(), [], {"random": repr(self.parts)})
        return fingerprint(self.folder, ["transformer", "vqvae"], {}) + adapters_identity(self.config)

    # Prompts

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Return {"text": (B, 77, D), "pooled": (B, D)} of each prompt."""
        rows = self._conditions(prompts, self.device)
        self._drop_encoder()
        return rows

    def nothing(self) -> Condition:
        """Return the condition of `config.negative_prompt`, one row."""
        return self._nothing

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text; 0 where there is no tokenizer."""
        return [0 if self._tokenizer is None else len(self._tokenizer(text)["input_ids"]) for text in texts]

    def _encode_all(self, prompts: Sequence[Prompt], world: World) -> None:
        every = [Prompt(self.config.negative_prompt, {}), *prompts]
        world.on_all(lambda: self._conditions.fill(every, begin=world.rank / world.size))
        self._nothing = self._conditions(every[:1], self.device)
        self._drop_encoder()

    def _cache_folder(self) -> Path | None:
        settings, config = {"dtype": self.config.dtype}, self.config
        if self.folder is None:
            return None
        return entries_of(self.folder, ["tokenizer", "text_encoder"], settings, config.condition_cache)

    @torch.no_grad()
    def _row(self, prompt: Prompt) -> Row:
        if self.folder is None or self._tokenizer is None:
            widths = self.parts.transformer["encoder_hidden_size"], self.parts.transformer["cond_embed_dim"]
            text = normal((1, TEXT_TOKENS, widths[0]), self.seed, f"text:{prompt.text}")
            return {"text": text, "pooled": normal((1, widths[1]), self.seed, f"pooled:{prompt.text}")}
        if self._encoder is None:
            what = f"model.path: the text_encoder of {self.parts.where}"
            encoder = load_network(CLIPTextModelWithProjection, self.folder / "text_encoder", what)
            self._encoder = encoder.requires_grad_(False).to(self.device)
        limit = min(self._tokenizer.model_max_length, TEXT_TOKENS)
        given = self._tokenizer(
            prompt.text, return_tensors="pt", padding="max_length", truncation=True, max_length=limit
        )
        found = self._encoder(given.input_ids.to(self.device), output_hidden_states=True)
        return {"text": found.hidden_states[-2].float(), "pooled": found.text_embeds.float()}

    def _drop_encoder(self) -> None:
        if self._encoder is not None:
            self._encoder = None
            gc.collect()

    # The network

    def call(self, tokens: Tokens, condition: Condition, read: Read) -> Tensor:
        """Call the network on B images of codes and masks; see `TokenModel`. Its last layer sees all tokens at once."""
        width, height = float(self.config.width), float(self.config.height)
        conditions = torch.tensor([[width, height, 0.0, 0.0, AESTHETICS]], device=tokens.device)
        logits = self.network(
            tokens.view(-1, *self.grid),
            encoder_hidden_states=condition.tensors["text"].to(self.dtype),
            pooled_text_emb=condition.tensors["pooled"].to(self.dtype),
            micro_conds=conditions.expand(len(tokens), -1),
        )
        return read(logits.flatten(2).transpose(1, 2).float(), lambda some: some)

    @torch.no_grad()
    def decode(self, tokens: Tokens, frames: int | None = None) -> Videos:
        """Return images as videos of one frame, (B, 1, 3, H, W) in [0, 1]."""
        shape = (len(tokens), *self.grid, self.parts.vqvae["latent_channels"])
        decoder: Any = self.decoder
        images = decoder.decode(tokens.view(-1, *self.grid), force_not_quantize=True, shape=shape).sample
        return images.float().clamp(0, 1)[:, None]

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
        self.network.save_pretrained(folder / "transformer")


def _random(kind: Any, settings: Mapping[str, Any], dtype: torch.dtype, world: World) -> Any:
    with init_empty_weights(include_buffers=False):
        network = kind.from_config(dict(settings))
    fill(network, dtype, world.device.type == "meta")
    return network


def _loaded(kind: Any, folder: Path, part: str, parts: Parts) -> Any:
    try:
        return kind.from_pretrained(folder / part)
    except Exception as error:  # each library raises its own kinds
        raise UserError(f"model.path: the {part} of {parts.where} could not be loaded: {first_line(error)}") from error
