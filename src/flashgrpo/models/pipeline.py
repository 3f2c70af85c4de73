"""A diffusers pipeline as a `VideoModel`: all that families have in common. A family's own file says what differs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError
from flashgrpo.models.conditions import Conditions, Row, entries_of, fingerprint
from flashgrpo.models.lora import at_start, starting_weights, trained_parameters, write_adapters
from flashgrpo.models.network import channels_last, prepare_network, try_attention
from flashgrpo.models.residence import Residence
from flashgrpo.models.settings import Lora, ModelConfig
from flashgrpo.models.source import Source
from flashgrpo.models.warm_start import adapter_files, adapters_identity, read_adapters
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.processes.flow.schedule import SigmaGrid, grid_from_scheduler
from flashgrpo.types import Condition, Latents, LoraStyle, Prompt, Videos, index_rows

Size = tuple[int, int, int, int]
MANY = 64  # prompts that are worth a word before they are encoded


class PipelineModel(ABC):
    """The parts of a pipeline as a `VideoModel`; the denoising loop is not the pipeline's.

    Attributes:
        pipeline: of the class that the checkpoint names; its encoders are None while nothing is encoded.
        latent_shape: (C, F, H, W) of one sample.
        experts: component -> transformer, one or two.
        network: the transformer, or an `nn.ModuleDict` of both.
        takes_image: whether each prompt has to come with an image.
    """

    expert_names: ClassVar[Sequence[str]] = ("transformer",)
    """Components that are trained; a checkpoint may lack the later ones."""
    encoder_names: ClassVar[Sequence[str]] = ("text_encoder",)
    """Components that are needed for prompts only."""
    cached_parts: ClassVar[Sequence[str]] = ("tokenizer", "text_encoder")
    """Folders of the checkpoint on which a prompt's row depends."""
    takes_image = False

    def __init__(
        self,
        source: Source,
        config: ModelConfig,
        world: World,
        seed: int,
        prompts: Sequence[Prompt] = (),
        keep_reference: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Encode `prompts` first, then load the network: the two never share the memory. See `load_model`."""
        self.source = source
        self.pipeline = source.pipeline
        self.config = config
        self.device = world.device
        self.dtype: torch.dtype = getattr(torch, config.compute_dtype or config.dtype)
        self.seed = seed
        self.say = say or (lambda _: None)
        self._residence: Residence | None = None
        self.pipeline.vae.requires_grad_(False)
        if world.device.type == "cpu":  # whose convolutions are a third faster so
            channels_last(self.pipeline.vae)
        self.latent_shape = self.shape_of_latents()
        self._conditions = Conditions(self._cache_folder(), self._row, self.takes_image)
        self._encode_all(prompts, world)
        self.experts = self._prepare_experts(world)
        first, *others = self.experts.values()
        self.network: nn.Module = nn.ModuleDict(self.experts) if others else first
        self._residence = Residence({**self.experts, "vae": self.pipeline.vae}, self.device, config.offload)
        self._start = starting_weights(self.network, config, keep_reference)
        if config.attention:
            x, one = torch.zeros(1, *self.latent_shape, device=self.device), torch.ones(1)
            point = GridPoint(one, one.double(), one)
            call = partial(self.forward, x=x, point=point, condition=self.nothing())
            try_attention(self.experts.values(), config.attention, call)

    # What a family says

    @abstractmethod
    def encode_text(self, text: str) -> Row:
        """Return the embedding of a text by the pipeline's own encoder, rows (1, L, ...)."""

    @abstractmethod
    def random_text(self, text: str) -> Row:
        """Draw rows of the same shapes by the text, for networks with random weights, which have no encoder."""

    def encode_image(self, image: Any) -> Row:
        """Return what a prompt's image adds to its row: nothing, but in a family that `takes_image`."""
        return {}

    @abstractmethod
    def forward(self, network: nn.Module, x: Latents, point: GridPoint, condition: Condition) -> Tensor:
        """Compute the network's velocity for each row, without guidance, in float32."""

    @abstractmethod
    def decode_latents(self, vae: Any, latents: Latents) -> Tensor:
        """Decode to the pipeline's video (B, 3, F, H, W) in [-1, 1]."""

    def latents_for(self, frames: int) -> int | None:
        """Count the latent frames from which the first `frames` are decoded: fewer than all if it is causal."""
        return None

    @abstractmethod
    def shape_of_latents(self) -> Size:
        """(C, F, H, W) for the configured video size, or a `UserError` that names the nearest size that fits.

        Asked for before the network is loaded.
        """

    @abstractmethod
    def tokens(self) -> int:
        """Count the tokens of a sample inside of the network."""

    @abstractmethod
    def original_name(self, name: str) -> str | None:
        """Return a layer's name in the family's released checkpoints, which ComfyUI reads; None where it has none."""

    def expert_at(self, timestep: float) -> str:
        """Tell which component computes at a timestep."""
        return self.expert_names[0]

    def grid(self, num_steps: int) -> SigmaGrid:
        """Return the grid of the checkpoint's scheduler, with `config.shift` in place of its own where given."""
        return grid_from_scheduler(self.pipeline.scheduler, num_steps, self.config.shift)

    # Prompts

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Return the rows of the prompts' texts, and of their images where the family takes them."""
        self._check_images(prompts)
        rows = self._conditions(prompts, self.device)
        if self._residence is not None:  # a prompt that was not known before, or whose entry was lost
            self.source.drop(self.encoder_names)
        return rows

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text, with the pipeline's own cleaning left out; 0 where there is no tokenizer."""
        if self.source.random:
            return [0] * len(texts)
        return [len(ids) for ids in self.pipeline.tokenizer(list(texts)).input_ids]

    def _encode_all(self, prompts: Sequence[Prompt], world: World) -> None:
        self._check_images(prompts)
        every = [negative := Prompt(self.config.negative_prompt, {}), *prompts]
        found = world.on_all(lambda: self._conditions.missing(every, *world.place_on_machine))
        if len(missing := [every[number] for number in sorted({number for part in found for number in part})]) > MANY:
            self.say(f"encoding {len(missing)} of {len(every)} prompts, once")
        world.on_all(lambda: self._conditions.fill(missing, begin=world.rank / world.size))
        self._negative = self._conditions([negative], self.device)  # one row, the same for every sample
        self.source.drop(self.encoder_names)

    def _check_images(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts if self.takes_image else ():
            if prompt.columns.get("image") is None:
                raise UserError(f"this model starts from an image: give {prompt.text!r} one in a column `image`")

    @torch.no_grad()
    def _row(self, prompt: Prompt) -> Row:
        """Return the row of a prompt; without an image that of its text alone."""
        if self.source.random:
            text = self.random_text(prompt.text)
        else:
            self.source.load(self.encoder_names)
            for name in self.encoder_names:
                if encoder := getattr(self.pipeline, name, None):
                    encoder.requires_grad_(False).to(self.device)
            text = self.encode_text(prompt.text)
        image = prompt.columns.get("image") if self.takes_image else None
        return text if image is None else {**text, **self.encode_image(image)}

    def _cache_folder(self) -> Path | None:
        config, folder = self.config, self.source.folder
        settings: dict[str, Any] = {"length": config.max_sequence_length, "dtype": config.dtype}
        if self.takes_image:
            size = config.num_frames, config.height, config.width
            settings |= {"size": size, "vae": config.vae_dtype, "pictures": "upright"}
        return entries_of(folder, self.cached_parts, settings, config.condition_cache) if folder else None

    # The network

    def _prepare_experts(self, world: World) -> dict[str, nn.Module]:
        config = self.config
        if (tokens := self.tokens()) % world.context:
            raise UserError(
                f"parallel.context: the {tokens} tokens of such a video cannot be split over {world.context} processes"
            )
        names = [name for name in self.expert_names if self.source.architecture.has(name)]
        experts: dict[str, Any] = {}
        files, convert = adapter_files(config, names), getattr(self.pipeline, "lora_state_dict", None)
        for name in names:  # each is placed before the next is loaded
            self.source.load([name])
            network = experts[name] = getattr(self.pipeline, name)
            start = read_adapters(files[name], network, self.original_name, convert, self.say) if files else None
            prepare_network(network, config, world, self.seed, f"{name}." if len(names) > 1 else "", start)
        for wanted, switch in ((config.vae_tiling, "enable_tiling"), (config.vae_slicing, "enable_slicing")):
            if wanted:
                getattr(self.pipeline.vae, switch)()
        return experts

    @property
    def identity(self) -> str:
        """A digest of samples from the checkpoint's weights, or of the sizes where weights are random."""
        folder, sizes = self.source.folder, {"random": repr(self.source.architecture)}
        own = fingerprint(folder, [*self.expert_names, "vae"], {}) if folder else fingerprint(Path(), [], sizes)
        return own + adapters_identity(self.config)

    @property
    def offloads(self) -> bool:
        """Whether parts of the model leave the device while others compute."""
        return self.config.offload

    @property
    def recomputes(self) -> bool:
        """Whether a backward pass computes the blocks again."""
        return self.config.gradient_checkpointing

    def expert(self, timestep: float) -> nn.Module:
        """Return the component that computes at a timestep, which is all of `network` where there is one only."""
        return self.experts[self.expert_at(timestep)]

    def velocity(self, x: Latents, point: GridPoint, condition: Condition) -> Latents:
        """Compute v_negative + scale (v_text - v_negative); rows of different experts one expert after the other."""
        owners = [self.expert_at(float(timestep)) for timestep in point.timestep]
        parts, order = [], []
        for name in dict.fromkeys(owners):
            rows = torch.tensor([row for row, owner in enumerate(owners) if owner == name])
            network = self.part(name)
            alone = len(rows) == len(x)
            part = (x, point, condition) if alone else (index_rows(x, rows), point[rows], condition[rows])
            parts.append(self._guided(network, *part))
            order.append(rows)
        return parts[0] if len(parts) == 1 else torch.cat(parts)[torch.cat(order).argsort()]

    def _guided(self, network: nn.Module, x: Latents, point: GridPoint, condition: Condition) -> Tensor:
        """Compute both branches in one forward; where all scales are 1, the text's alone."""
        scale = point.guidance_scale
        if bool((scale == 1).all()):
            return self.forward(network, x, point, condition)
        twice = torch.arange(len(x)).repeat(2)
        both = Condition.stack([condition, condition.replaced(self._negative)])
        v_text, v_negative = self.forward(network, torch.cat([x, x]), point[twice], both).chunk(2)
        return v_negative + scale.view(-1, 1, 1, 1, 1).to(x.device, non_blocking=True) * (v_text - v_negative)

    def idle(self, point: GridPoint) -> Tensor:
        """Call the expert of that point once, on one row of zeros."""
        network = self.part(self.expert_at(float(point.timestep)))
        x = torch.zeros(1, *self.latent_shape, device=self.device)
        return self.forward(network, x, point, self.nothing())

    def nothing(self) -> Condition:
        """Return a condition of one row for calls whose result is not used."""
        return self._negative

    def part(self, name: str) -> nn.Module:
        """Return an expert, or the "vae", on the device."""
        if self._residence is None:  # while prompts are encoded
            module: nn.Module = getattr(self.pipeline, name)
            return module.to(self.device)
        return self._residence.bring(name)

    @torch.no_grad()
    def decode(self, latents: Latents, frames: int | None = None) -> Videos:
        """Decode videos (B, F, 3, H, W) in [0, 1]; with `frames` only the first, from the latents that these need."""
        needed = None if frames is None else self.latents_for(frames)
        video = self.decode_latents(self.part("vae"), latents[:, :, :needed])[:, :, :frames]
        return (video.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 1, 3, 4).contiguous()

    def reference(self) -> AbstractContextManager[None]:
        """Compute with the model that training began with, adapters of a warm start and all, inside this context."""
        return at_start(self.network, list(self.experts.values()), self._start)

    # Getting the result out

    def save_lora(self, folder: Path, tensors: Mapping[str, Tensor], style: LoraStyle = "diffusers") -> list[str]:
        """Write `pytorch_lora_weights.safetensors`, or one file for each of two experts.

        `load_lora_weights` of the family's pipeline reads both styles. The one of ComfyUI has the layers' original
        names and the factor alpha / rank inside of B.
        """
        original_name = self.original_name if style == "comfyui" else None
        return write_adapters(self.experts, tensors, folder, type(self.pipeline), original_name)

    def save_merged(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the pipeline with the adapters added to its weights, or with the fully trained weights."""
        for name, parameter in trained_parameters(self.network).items():
            parameter.data.copy_(tensors[name])
        networks: list[Any] = list(self.experts.values())
        for network in networks if isinstance(self.config.train, Lora) else ():
            network.fuse_lora()
            network.unload_lora()
        self.source.load(self.encoder_names)
        self.pipeline.save_pretrained(folder)
