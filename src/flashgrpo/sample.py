"""Videos of the base model beside those of the tuned one, from the same noise."""

from pathlib import Path

import torch

from flashgrpo import checkpoint
from flashgrpo.distributed import joined, use_threads
from flashgrpo.errors import UserError
from flashgrpo.evaluate import deterministic_policy
from flashgrpo.models import load_model
from flashgrpo.models.lora import weights_replaced
from flashgrpo.progress import Reporter
from flashgrpo.rollout import denoise
from flashgrpo.run_directory import RunDirectory
from flashgrpo.schedule import Euler
from flashgrpo.seeds import normal
from flashgrpo.video import side_by_side, write_mp4


def sample(run: Path, prompt: str, out: Path, seed: int = 0, num_steps: int | None = None) -> Path:
    """Write one mp4: the base model's video on the left, the tuned model's (best checkpoint) on the right.

    Raises:
        UserError: no run or checkpoint, an empty prompt, or `out` is no .mp4 that can be written.
    """
    directory, config = RunDirectory.existing(run)
    if not prompt.strip():
        raise UserError("the prompt is empty")
    if out.suffix != ".mp4":
        raise UserError(f"--out: {out} must end in .mp4")
    update = checkpoint.choose(directory.checkpoints, None, Reporter().warn)
    averaged = checkpoint.load(directory.checkpoints, update, kinds=["ema"])["ema"]
    use_threads(config.parallel.threads)
    with joined(config, strict=False) as team:
        model = load_model(config.model, team, config.seed)
        policy = deterministic_policy(model, config, num_steps or config.evaluation.num_steps)
        condition = model.encode([prompt])
        noise = normal(model.latent_shape, seed, "sample")[None].to(model.device)

        @torch.no_grad()
        def video() -> torch.Tensor:
            return model.decode(denoise(policy, noise, condition, Euler(), 1, team))[0]

        base = video()
        with weights_replaced(model.network, averaged):
            tuned = video()
    write_mp4(out, side_by_side(base, tuned), config.model.fps)
    return out
