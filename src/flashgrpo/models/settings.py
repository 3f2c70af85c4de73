"""Settings of a model: the checkpoint, the size of its videos, what is trained of it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, GetJsonSchemaHandler, model_validator

from flashgrpo.errors import UserError
from flashgrpo.settings import Count, Part, PathText


class Lora(Part):
    """Train low-rank adapters on the named linear layers (through peft)."""

    kind: Literal["lora"] = "lora"
    """Which of the choices this is."""
    rank: int = Field(default=16, ge=1, le=10_000)
    """Width of the adapters."""
    alpha: Count = 32
    """Their outputs are multiplied by alpha / rank."""
    targets: tuple[str, ...] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    )
    """Module names; one that a model lacks is passed over as long as another matches."""


class Full(Part):
    """Train every parameter of the network."""

    kind: Literal["full"] = "full"
    """Which of the choices this is."""


class ModelConfig(Part):
    """The video model: a diffusers pipeline folder or hub id, and the size of its videos."""

    path: PathText
    """A local folder, a hub id, or `flashgrpo:tiny/weights`, the bundled model."""
    generator: PathText | None = None
    """Of a streaming model: a file with the transformer's weights, as Self-Forcing publishes it, beside the folder."""
    adapters: PathText | None = None
    """A LoRA to begin with (safetensors), or its folder: with one file for each of two experts, by high and low."""
    merge_adapters: bool = False
    """Add `adapters` to the weights before training, which then trains new ones; else these are trained further."""
    height: int = Field(ge=1, le=16_384)
    """Pixels."""
    width: int = Field(ge=1, le=16_384)
    """Pixels."""
    num_frames: int = Field(ge=1, le=100_000)
    """Frames of a video."""
    fps: float = Field(default=16.0, ge=0.01, le=1_000)
    """Frames a second."""
    length: int | None = Field(default=None, ge=1, le=100_000)
    """Tokens of a text that a language model writes; height, width and num_frames are then left out."""
    max_sequence_length: int = Field(default=512, ge=1, le=100_000)
    """Text tokens; the pipeline pads to it."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    from_image: bool = False
    """Start each video from its prompt's image, with a checkpoint that does both (Wan 2.2 TI2V-5B)."""
    shift: float | None = Field(default=None, ge=0.001, le=1_000)
    """Overrides the flow shift of the checkpoint's scheduler."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen weights; adapters, latents and densities are always float32."""
    compute_dtype: Literal["bfloat16"] | None = None
    """Casts all weights, norms too, for each computation and reduces gradients in float32 (FSDP2)."""
    vae_dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Of the autoencoder; `auto` is bfloat16 where the device has units for it, and float32 where it is slow."""
    train: Annotated[Lora | Full, Field(discriminator="kind")] = Lora()
    """Adapters (`lora`), or every weight (`full`)."""
    gradient_checkpointing: bool = False
    """Compute a block again in the backward pass rather than keep what is inside of it."""
    offload: bool = False
    """Keep on the device only the part that computes: one expert, or the autoencoder, and what is trained."""
    vae_tiling: bool = False
    """Decode in overlapping tiles: less memory, and slightly other pixels at the seams."""
    vae_slicing: bool = False
    """Decode a batch one video at a time."""
    attention: str | None = None
    """Attention back end, by diffusers' name for it (flash, sage, _native_cudnn); torch's choice when not given."""
    compile: bool = False
    """Compile the blocks for the deterministic steps (torch.compile); the step that is trained is never compiled."""
    condition_cache: PathText | None = None
    """Folder of computed text embeddings; `$FLASHGRPO_CACHE` or ~/.cache/flashgrpo when not given."""
    random_init: bool = False
    """Random weights in place of the checkpoint's, to measure shapes, memory and speed without a download."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Require no size in a recipe's schema: texts have none, and of others it is asked for when they are read."""
        schema = handler(core)
        handler.resolve_ref_schema(schema)["required"] = ["path"]
        return schema

    @model_validator(mode="before")
    @classmethod
    def _texts_have_no_size(cls, given: Any) -> Any:
        written = isinstance(given, Mapping) and given.get("length") is not None
        return {"height": 1, "width": 1, "num_frames": 1, **given} if written else given

    @property
    def continues_adapters(self) -> bool:
        """Whether what is trained begins with the values of a file."""
        return self.adapters is not None and not self.merge_adapters

    def plain(self) -> "ModelConfig":
        """Return the same model without what only spreads its computation or makes it faster."""
        return self.model_copy(update={"compute_dtype": None, "offload": False, "attention": None, "compile": False})

    def weightless(self) -> "ModelConfig":
        """Return the same model for counting: without weights, its own or of adapters."""
        return self.plain().model_copy(update={"random_init": True, "adapters": None})

    def check_no_generator(self) -> None:
        """Refuse a generator's file, for a model that is not a streaming one.

        Raises:
            UserError: one is given.
        """
        if self.generator is not None:
            raise UserError("model.generator: it is for streaming models, such as preset kvpo trains; leave it out")

    def check(self, sharded: bool) -> None:
        """Refuse what cannot go together.

        Raises:
            ValueError: offload of a network that FSDP2 holds or that is trained whole, a dtype without effect, or
                adapters to go on with where none are trained.
        """
        if self.merge_adapters and self.adapters is None:
            raise ValueError("model.merge_adapters: there is nothing to merge; name the file in model.adapters")
        if self.continues_adapters and isinstance(self.train, Full):
            raise ValueError("model.adapters: full training has none to go on with; take model.merge_adapters=true")
        if self.offload and sharded:
            raise ValueError("model.offload: a network that FSDP2 holds stays where it is; choose one of the two")
        if self.offload and isinstance(self.train, Full):
            raise ValueError("model.offload: full training has nothing that could be off the device; leave it out")
        if self.dtype != "float32" and isinstance(self.train, Full):
            raise ValueError(f"model.dtype: full training keeps float32 weights, so {self.dtype} has no effect")
