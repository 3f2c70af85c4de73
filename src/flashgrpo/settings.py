"""The parts of a run's settings, one class per top-level key of its file; `config.py` puts them together."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flashgrpo.inputs import LatentVideos, Pixels, VideoFiles
from flashgrpo.reuse import FirstBlock, TaylorSeer
from flashgrpo.solvers import Euler, UniPC


class Part(BaseModel):
    """Settings are immutable and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


Solver = Annotated[Euler | UniPC, Field(discriminator="kind")]


class Lora(Part):
    """Train low-rank adapters on the named linear layers (through peft)."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
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


class ModelConfig(Part):
    """The video model: a diffusers pipeline folder or hub id, and the size of its videos."""

    path: str
    """A local folder, a hub id, or `flashgrpo:tiny/weights`, the bundled model."""
    height: int = Field(ge=1)
    """Pixels."""
    width: int = Field(ge=1)
    num_frames: int = Field(ge=1)
    fps: float = Field(default=16, gt=0)
    max_sequence_length: int = Field(default=512, ge=1)
    """Text tokens; the pipeline pads to it."""
    negative_prompt: str = ""
    from_image: bool = False
    """Start each video from its prompt's image, with a checkpoint that does both (Wan 2.2 TI2V-5B)."""
    shift: float | None = Field(default=None, gt=0)
    """Overrides the flow shift of the checkpoint's scheduler."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen weights; adapters, latents and densities are always float32."""
    compute_dtype: Literal["bfloat16"] | None = None
    """Casts all weights, norms too, for each computation and reduces gradients in float32 (FSDP2)."""
    vae_dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Of the autoencoder; `auto` is bfloat16 where the device has units for it, and float32 where it is slow."""
    train: Annotated[Lora | Full, Field(discriminator="kind")] = Lora()
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
    condition_cache: str | None = None
    """Folder of computed text embeddings; `$FLASHGRPO_CACHE` or ~/.cache/flashgrpo when not given."""
    random_init: bool = False
    """Random weights in place of the checkpoint's, to measure shapes, memory and speed without a download."""


class RolloutConfig(Part):
    """How the samples of an update are drawn."""

    prompts: int = Field(default=8, ge=1)
    """Prompt groups per update, P."""
    group_size: int = Field(default=8, ge=2)
    """Samples per prompt, G; the baseline of a sample is the mean of its group, so one is not enough."""
    num_steps: int = Field(default=20, ge=2)
    """Denoising steps, N."""
    guidance_scale: float = Field(default=4.5, ge=1)
    """Classifier-free guidance in rollout and update; 1 turns it off."""
    guidance_scale_2: float | None = Field(default=None, ge=1)
    """Where the second of two experts computes (Wan 2.2 A14B); as the first when not given."""
    solver: Solver = Euler()
    """Of the deterministic steps."""
    deterministic_steps: int | None = Field(default=None, ge=1)
    """Points of the grid at which a deterministic walk stops at most, evenly spread, with both ends of each stochastic
    step besides; all N when not given."""
    guidance_interval: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    """Sigmas between which deterministic steps use guidance, none with [0, 0]; stochastic steps always do."""
    deterministic_dtype: Literal["bfloat16", "float8"] | None = None
    """In which the network computes deterministic steps (autocast); `float8` is of the frozen linear layers of the
    blocks, beside bfloat16, for GPUs that have units for it."""
    reuse: Annotated[FirstBlock | TaylorSeer, Field(discriminator="kind")] | None = None
    """Of features from one deterministic step to the next, by diffusers' hooks; not for a network that is sharded."""
    retain: bool | None = None
    """Keep the graph of a trained step from rollout to update rather than replay it; when not given, where a rollout
    serves one optimizer step and all graphs take at most a quarter of the device's memory and half of what is free."""
    micro_batch: int = Field(default=64, ge=1)
    """Samples denoised at once."""
    decode_micro_batch: int = Field(default=64, ge=1)
    """Latents decoded at once."""

    @model_validator(mode="after")
    def _possible(self) -> "RolloutConfig":
        if self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(f"guidance_interval is a pair of sigmas, low <= high, not {list(self.guidance_interval)}")
        return self


class EmaConfig(Part):
    """Exponential moving average of the trained weights; evaluation and export use it."""

    decay: float = Field(default=0.9, ge=0, lt=1)
    every: int = Field(default=8, ge=1)
    """Optimizer steps between two averagings."""


class OptimConfig(Part):
    """AdamW and how an update is cut into optimizer steps and micro-batches."""

    lr: float = Field(default=1e-4, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: float = Field(default=1e-4, ge=0)
    eps: float = Field(default=1e-8, gt=0)
    warmup: int = Field(default=0, ge=0)
    """Optimizer steps over which the learning rate rises linearly."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    micro_batch: int = Field(default=16, ge=1)
    """Transitions in one backward pass; it changes memory and speed, never the gradient."""
    minibatches: int = Field(default=1, ge=1)
    """Optimizer steps per pass over a rollout; each takes an equal share of its transitions."""
    passes: int = Field(default=1, ge=1)
    """Passes over a rollout."""
    ema: EmaConfig = EmaConfig()
    eight_bit: bool = False
    """Keep AdamW's moments in 8 bits (torchao): a quarter of their memory, for full training in one process."""
    grad_norm_by_step: bool = True
    """Record the gradient norm by denoising step; it takes the memory of two more copies of the gradients."""


class PromptsConfig(Part):
    """Prompt files: .txt, a prompt a line; .jsonl, .csv, .parquet, whose columns beside `prompt` reach the rewards."""

    train: str
    heldout: str


class RewardConfig(Part):
    """A reward: any callable, or a class whose instances are."""

    call: str
    """`package.module:function`, `path/to/file.py:function`, or `http://host:port` of a server; several with commas."""
    weight: float = 1.0
    """Negative to train against a quantity."""
    watched: bool = False
    """Scored at evaluation only and never trained on: a watch for reward hacking."""
    max_fall: float | None = Field(default=None, ge=0)
    """Of a watched reward: end the run when it has fallen by more than this, with 95 % confidence, in every component's
    own units, while the trained reward has risen."""
    input: Annotated[Pixels | LatentVideos | VideoFiles, Field(discriminator="kind")] | None = None
    """What it is handed; as the reward says itself when not given."""
    args: dict[str, Any] = {}
    """Further keyword arguments of the callable."""

    @model_validator(mode="after")
    def _counts(self) -> "RewardConfig":
        if self.max_fall is not None and not self.watched:
            raise ValueError("max_fall is for a reward that is watched; say watched: true, or leave it out")
        if self.weight == 0:
            raise ValueError("weight must not be 0; a reward that is only to be looked at says watched: true")
        if self.watched and self.weight != 1:
            raise ValueError("weight has no effect on a watched reward; leave it out")
        return self


class EvaluationConfig(Part):
    """Held-out prompts on fixed noise with a deterministic solver, paired with the base model."""

    every: int = Field(default=10, ge=1)
    """Updates between two evaluations; the last update is always evaluated."""
    num_steps: int = Field(default=50, ge=2)
    guidance_scale: float | None = Field(default=None, ge=1)
    """The rollout's when not given."""
    guidance_scale_2: float | None = Field(default=None, ge=1)
    """The rollout's when neither is given."""
    solver: Solver = Euler()
    samples_per_prompt: int = Field(default=1, ge=1)
    seed: int = Field(default=1_000, ge=0)
    videos: int = Field(default=8, ge=0)
    """So many samples, spread evenly over the prompts, are kept as mp4 of the base and of each new best."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations without a new best."""


class CheckpointConfig(Part):
    """When the run is saved; every evaluation is followed by a checkpoint as well."""

    every: int = Field(default=10, ge=1)
    keep: int = Field(default=2, ge=1)
    """The newest so many are kept, and the best."""


class ParallelConfig(Part):
    """Use of the machine, and of many: what torchrun started is cut into replicate x shard x context."""

    threads: int | None = Field(default=None, ge=1)
    """CPU threads of the tensor library; its own choice when not given."""
    shard: int = Field(default=1, ge=1)
    """Processes that hold one copy of the network between them (FSDP2); the rest of the processes are copies."""
    context: int = Field(default=1, ge=1)
    """Processes that compute one sample together, each a part of its tokens."""
    context_kind: Literal["ulysses", "ring"] = "ulysses"
    """Ulysses needs heads and tokens that divide by `context`; ring needs a GPU's attention."""
    shares: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """How much of an update's samples each data rank takes, in any unit; equal parts when not given."""
    reward_ranks: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """The processes that compute the rewards of all videos; when none is given, each scores what it has drawn."""
    dead_after: float = Field(default=60, gt=2)
    """Seconds without a sign of life after which a process counts as dead, and all end."""
    timeout: float = Field(default=1800, gt=0)
    """Seconds that a process waits for the others, for instance until their rewards are there."""


class TrackingConfig(Part):
    """What is shown while a run goes on, and to whom."""

    progress: bool = True
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "swanlab", "mlflow"], ...] = ()
    """Get what metrics.jsonl and evaluations.jsonl get; each needs its package."""
    project: str = "flash-grpo"
    """The runs' common name there."""
    offline: bool = True
    """Nothing leaves this machine; a tracker with an account sends only where this is false."""
    profile: int = Field(default=0, ge=0)
    """So many updates, after the first, are traced by torch.profiler into profile/, for Perfetto or chrome://tracing."""
    preflight: Literal["refuse", "warn", "skip"] = "refuse"
    """What `train` does where the doctor's quick checks, before the first update, find the run unsound."""
