"""A diffusers pipeline as a `VideoModel`: all that families have in common. A family's own file says what differs."""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError
from flashgrpo.models.conditions import Conditions, fingerprint
from flashgrpo.models.lora import at_start, starting_weights, trained_parameters, write_adapters
from flashgrpo.models.network import channels_last, prepare_network, try_attention
from flashgrpo.models.prompts import EncodesPrompts
from flashgrpo.models.residence import Residence
from flashgrpo.models.settings import Lora, ModelConfig
from flashgrpo.models.source import LARGE, Source
from flashgrpo.models.warm_start import adapter_files, adapters_identity, read_adapters
from flashgrpo.process import PipelineCall
from flashgrpo.processes.flow.choices import GuidanceKind
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.processes.flow.schedule import SigmaGrid, grid_from_scheduler
from flashgrpo.settings import DEFAULT_ADAPTERS
from flashgrpo.types import Condition, Latents, LoraStyle, Prompt, Videos, Waves, index_rows

Size = tuple[int, int, int, int]
Spacing = Float64[np.ndarray, " steps"]


class PipelineModel(EncodesPrompts):
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

    keeps_spacing: ClassVar[bool] = False
    """Whether the pipeline leaves multistep schedulers their own spacing of sigmas."""

    sample_rate: int | None = None
    """Samples a second of a video's sound; None of a family that makes none."""

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
        if world.device.type == "cpu":  # whose convolutions are a third faster so
            for decoder in source.decoders.values():
                channels_last(decoder)
        self.latent_shape = self.shape_of_latents()
        self._conditions = Conditions(self._cache_folder(), self._row, self.image_columns)
        self._encode_all(prompts, world)
        self.experts = self._prepare_experts(world)
        first, *others = self.experts.values()
        self.network: nn.Module = nn.ModuleDict(self.experts) if others else first
        self._residence = Residence({**self.experts, **source.decoders}, self.device, config.offload)
        self._start = starting_weights(self.network, config, keep_reference)
        if config.attention:
            x, one = torch.zeros(1, *self.latent_shape, device=self.device), torch.ones(1)
            point = GridPoint(one, one.double(), one)
            call = partial(self.forward, x=x, point=point, condition=self.nothing())
            try_attention(self.experts.values(), config.attention, call)

    # What a family says

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
        shifts = self.config.shift, self.mu(num_steps)
        return grid_from_scheduler(self.pipeline.scheduler, num_steps, *shifts, self.spacing(num_steps))

    def unused_layers(self) -> Sequence[str]:
        """Name the network's modules whose results it drops, which get no gradient: none in most families."""
        return ()

    def mu(self, num_steps: int) -> float | None:
        """Return what the pipeline shifts a scheduler by that shifts by resolution; None where it passes nothing."""
        return None

    def spacing(self, num_steps: int) -> Spacing | None:
        """Return the sigmas before the shift that the pipeline passes: 1, 1 - 1/N, ..., 1/N where it computes a `mu`.

        None where it leaves them to its scheduler. Their last bits count, since UniPC cuts timesteps to whole numbers.
        """
        multistep = self.pipeline.scheduler.config.get("use_flow_sigmas")
        if self.mu(num_steps) is None or (self.keeps_spacing and multistep):
            return None
        return np.linspace(1.0, 1 / num_steps, num_steps)

    def shift_by_tokens(self, high: float = 1.15, low: float = 0.5, fewest: int = 256) -> float:
        """Return a `mu` that rises with the number of tokens, between the scheduler's own ends or the pipeline's.

        It is `calculate_shift` of diffusers' pipelines, whose modules print notices of torchvision when imported.
        """
        own = {"base_image_seq_len": fewest, "max_image_seq_len": 4096, "base_shift": low, "max_shift": high}
        few, many, low, high = (self.pipeline.scheduler.config.get(*item) for item in own.items())
        slope = (high - low) / (many - few)
        return float(self.tokens() * slope + (low - slope * few))

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
            read = partial(read_adapters, original_name=self.original_name, convert=convert, say=self.say)
            starts = {DEFAULT_ADAPTERS: read(files[name], network)} if files else {}
            prefix = f"{name}." if len(names) > 1 else ""
            prepare_network(network, config, world, self.seed, prefix, starts, self.unused_layers())
        for wanted, switch in ((config.vae_tiling, "enable_tiling"), (config.vae_slicing, "enable_slicing")):
            if wanted:
                getattr(self.pipeline.vae, switch)()
        return experts

    @property
    def identity(self) -> str:
        """A digest of samples from the checkpoint's weights, or of the sizes where weights are random."""
        folder, parts = self.source.folder, [*self.expert_names, *self.source.decoders]
        sizes = {"random": repr(self.source.architecture)}
        own = fingerprint(folder, parts, {}) if folder else fingerprint(Path(), [], sizes)
        return own + adapters_identity(self.config)

    @property
    def guidance(self) -> GuidanceKind:
        """What a guidance scale above 1 does."""
        return self.source.architecture.guidance

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
        """Compute both branches in one forward; the text's alone where all scales are 1, or are fed to the network."""
        scale = point.guidance_scale
        if self.guidance != "classifier-free" or bool((scale == 1).all()):
            return self.forward(network, x, point, condition)
        twice = torch.arange(len(x)).repeat(2)
        both = Condition.stack([condition, condition.replaced(self._negative)])
        v_text, v_negative = self.forward(network, torch.cat([x, x]), point[twice], both).chunk(2)
        return self.guided(v_text, v_negative, scale.view(-1, 1, 1, 1, 1).to(x.device, non_blocking=True))

    def guided(self, v_text: Latents, v_negative: Latents, scale: Tensor) -> Latents:
        """Go from the velocity of the negative prompt through that of the text."""
        return v_negative + scale * (v_text - v_negative)

    def idle(self, point: GridPoint) -> Tensor:
        """Call the expert of that point once, on one row of zeros."""
        network = self.part(self.expert_at(float(point.timestep)))
        x = torch.zeros(1, *self.latent_shape, device=self.device)
        return self.forward(network, x, point, self.nothing())

    def nothing(self) -> Condition:
        """Return a condition of one row for calls whose result is not used."""
        return self._negative

    def part(self, name: str) -> nn.Module:
        """Return an expert or a decoder, as "vae" is one, on the device."""
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

    def decode_sound(self, latents: Latents) -> Waves:
        """Decode the sound of samples, where there is a `sample_rate`."""
        raise NotImplementedError

    def reference(self) -> AbstractContextManager[None]:
        """Compute with the model that training began with, adapters of a warm start and all, inside this context."""
        return at_start(self.network, list(self.experts.values()), self._start)

    # Getting the result out

    def pipeline_call(self, given: Mapping[str, Any]) -> PipelineCall:
        """Return the pipeline, and arguments of an evaluation as it names and counts them; others are left out."""
        kind = type(self.pipeline)
        known = inspect.signature(kind.__call__).parameters
        arguments = {name: value for name, value in given.items() if name in known}
        return PipelineCall(
            arguments, kind.__name__, images=self.image_columns, loads_adapters=hasattr(kind, "load_lora_weights")
        )

    def save_lora(self, folder: Path, tensors: Mapping[str, Tensor], style: LoraStyle = "diffusers") -> list[str]:
        """Write `pytorch_lora_weights.safetensors`, or one file for each of two experts.

        `load_lora_weights` of the family's pipeline reads both styles. The one of ComfyUI has the layers' original
        names and the factor alpha / rank inside of B.
        """
        original_name = self.original_name if style == "comfyui" else None
        return write_adapters(self.experts, tensors, folder, original_name)

    def save_merged(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the pipeline with the adapters added to its weights, or with the fully trained weights."""
        for name, parameter in trained_parameters(self.network).items():
            parameter.data.copy_(tensors[name])
        networks: list[Any] = list(self.experts.values())
        for network in networks if isinstance(self.config.train, Lora) else ():
            network.fuse_lora()
            network.unload_lora()
        self.source.load(LARGE)
        self.pipeline.save_pretrained(folder)
