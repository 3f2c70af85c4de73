"""What a checkpoint of URSA is made of: the settings and the weights of its components, read without its own code."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError, first_line
from flashgrpo.files import read_object
from flashgrpo.models.architectures import fill
from flashgrpo.models.network import channels_last
from flashgrpo.models.ursa import video
from flashgrpo.models.ursa.decoder import DEFAULTS, IbqDecoder
from flashgrpo.models.ursa.network import UrsaNetwork
from flashgrpo.models.ursa.video import CosmosDecoder
from flashgrpo.models.weights import load_tensors, read_safetensors
from flashgrpo.processes.tokens.uniform.settings import AnyPath, Metric, Mixture
from flashgrpo.seeds import generator

TRANSFORMER: Mapping[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 28,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "vocab_size": 215_669,
    "lm_vocab_size": 151_669,
    "lm_head_size": 64_000,
    "bov_token_id": 151_652,
}
"""What a checkpoint's transformer means that leaves them out: URSA-1.7B."""
SMALL: Mapping[str, Any] = {**TRANSFORMER, "hidden_size": 1024, "intermediate_size": 3072}
IBQ: Mapping[str, Any] = {
    **DEFAULTS,
    "num_vq_embeddings": 64_000,
    "vq_embed_dim": 256,
    "latent_channels": 256,
    "block_out_channels": (128, 128, 256, 256, 512),
}
"""Sizes of IBQ's published decoders (arXiv 2412.02692); those of URSA's are in its folders."""
DEFAULT_SCHEDULER: Mapping[str, Any] = {"alpha": None, "c": None, "shift": 1.0}
WEIGHTS = "diffusion_pytorch_model*.safetensors"


@dataclass(frozen=True)
class Ursa:
    """The settings of a checkpoint's components, completed by the defaults of URSA's classes.

    Raises:
        UserError: the parts are of different vocabularies.
    """

    where: str
    transformer: Mapping[str, Any] = field(default_factory=lambda: TRANSFORMER)
    vae: Mapping[str, Any] = field(default_factory=lambda: IBQ)
    scheduler: Mapping[str, Any] = field(default_factory=lambda: {"alpha": 0.9, "c": 3.0, "shift": 1.0})

    def __post_init__(self) -> None:
        head, text, whole = (self.transformer[name] for name in ("lm_head_size", "lm_vocab_size", "vocab_size"))
        if head + text != whole:
            raise UserError(
                f"model.path: the transformer of {self.where} has {whole} tokens, which are not {text} of text and "
                f"{head} codes; get its files again"
            )
        if self.vae["num_vq_embeddings"] != head:
            raise UserError(
                f"model.path: the transformer of {self.where} draws {head} codes and its vae decodes "
                f"{self.vae['num_vq_embeddings']}; they belong to different checkpoints"
            )

    @classmethod
    def of_folder(cls, folder: Path) -> "Ursa":
        """Read a checkpoint's folder; a component's settings that a file leaves out are those of URSA's classes.

        Raises:
            UserError: a file of settings is missing or damaged, or parts do not belong together.
        """
        parts = {name: read_object(folder / name / "config.json") for name in ("transformer", "vae")}
        scheduler = read_object(folder / "scheduler" / "scheduler_config.json")
        vae = {**DEFAULTS, **parts["vae"]}
        if vae.get("_class_name") == video.DEFAULTS["_class_name"]:
            vae = {**video.DEFAULTS, **parts["vae"]}
        return cls(str(folder), {**TRANSFORMER, **parts["transformer"]}, vae, {**DEFAULT_SCHEDULER, **scheduler})

    @property
    def codec(self) -> str:
        """Class and quantizer of what its codes are decoded by."""
        return f"{self.vae.get('_class_name', 'AutoencoderVQ')} ({self.vae['_quantizer_name']})"

    @property
    def path(self) -> AnyPath:
        """How tokens were noised when it was trained."""
        alpha, c = self.scheduler["alpha"], self.scheduler["c"]
        return Mixture() if alpha is None else Metric(float(alpha), 3.0 if c is None else float(c))


COSMOS: Mapping[str, Any] = {**video.DEFAULTS, "sample_frames": 49}
"""Of videos of 49 frames, as URSA's are."""
DECODERS: Mapping[str, Callable[[Mapping[str, Any]], IbqDecoder | CosmosDecoder]] = {
    "AutoencoderVQ (VQuantizer)": IbqDecoder,
    "AutoencoderVQCosmos3D (FSQuantizer)": CosmosDecoder,
}
"""By class and quantizer."""

KNOWN: Mapping[str, Ursa] = {
    "BAAI/URSA-1.7B-IBQ512": Ursa("BAAI/URSA-1.7B-IBQ512"),
    "BAAI/URSA-1.7B-IBQ1024": Ursa("BAAI/URSA-1.7B-IBQ1024"),
    "BAAI/URSA-0.6B-IBQ1024": Ursa("BAAI/URSA-0.6B-IBQ1024", SMALL),
    "BAAI/URSA-1.7B-FSQ320": Ursa("BAAI/URSA-1.7B-FSQ320", vae=COSMOS),
    "BAAI/URSA-0.6B-FSQ320": Ursa("BAAI/URSA-0.6B-FSQ320", SMALL, COSMOS),
}
"""By hub id: sizes, for random weights without a download."""


def load_network(settings: Ursa, folder: Path | None, dtype: torch.dtype, world: World) -> UrsaNetwork:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        network = UrsaNetwork(settings.transformer)
    if folder is None:
        fill(network, dtype, world.device.type == "meta")
    else:
        what = f"model.path: the transformer of {settings.where}"
        tensors = read_safetensors(sorted((folder / "transformer").glob(WEIGHTS)), what)
        load_tensors(network, {name: tensor.to(dtype) for name, tensor in tensors.items()}, what)
    return network


def load_decoder(settings: Ursa, folder: Path | None, dtype: torch.dtype, world: World) -> IbqDecoder | CosmosDecoder:
    """Load what makes images or videos of codes.

    Raises:
        UserError: the codec is not written, or its files are not there or damaged.
    """
    from accelerate import init_empty_weights

    if settings.codec not in DECODERS:
        raise UserError(
            f"model.path: {settings.where} draws codes of {settings.codec}, whose decoder is missing here; known are "
            f"those of {' and '.join(DECODERS)}"
        )
    with init_empty_weights(include_buffers=False):
        decoder = DECODERS[settings.codec](settings.vae)
    if folder is None:
        fill(decoder, dtype, world.device.type == "meta")
    else:
        what = f"model.path: the vae of {settings.where}"
        tensors = read_safetensors(sorted((folder / "vae").glob(WEIGHTS)), what)
        own = {name: one.to(dtype) for name, one in tensors.items() if not name.startswith(("encoder.", "quant_conv."))}
        load_tensors(decoder, own, what)
    if world.device.type == "cpu":
        channels_last(decoder)
    return decoder.requires_grad_(False).eval().to(world.device)


def read_codes(settings: Ursa, folder: Path | None, seed: int) -> Tensor:
    """Return the embeddings of codes by which distances are measured, (V, D).

    The file may hold tensors only: nothing of it is run (`weights_only`).
    """
    count = settings.transformer["lm_head_size"]
    if folder is None:
        return torch.randn(count, settings.vae["vq_embed_dim"], generator=generator(seed, "codes"))
    file = folder / "scheduler" / "scheduler_model.pth"
    try:
        codes = torch.load(file, map_location="cpu", weights_only=True)["path.emb"].float()
    except Exception as error:  # of files, of pickles and of what must not be in them: all mean this
        raise UserError(
            f"model.path: {file} holds no embeddings of codes (path.emb) alone: {first_line(error)[:200]}"
        ) from error
    if codes.ndim != 2 or len(codes) != count:
        raise UserError(
            f"model.path: {file} has embeddings of {len(codes)} codes and the transformer draws {count}; they belong "
            "to different checkpoints"
        )
    return codes


def load_tokenizer(folder: Path, settings: Ursa) -> Any:
    """Load the folder's tokenizer, whose tokens have to be the network's."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    except Exception as error:  # each library raises its own kinds
        reason = first_line(error)[:200]
        raise UserError(f"model.path: the tokenizer of {settings.where} could not be loaded: {reason}") from error
    text = settings.transformer["lm_vocab_size"]
    if len(tokenizer) > text:
        raise UserError(
            f"model.path: the tokenizer of {settings.where} has {len(tokenizer)} tokens and its transformer {text} of "
            "text; they belong to different checkpoints"
        )
    if tokenizer.pad_token_id is None:
        raise UserError(f"model.path: the tokenizer of {settings.where} has no token to pad with; get its files again")
    return tokenizer
