"""How far the gradient of a few drawn steps is from that of all steps of the same samples: draws and chances compared.

    python benchmarks/masked_steps.py [RECIPE] [--repeats 40]

One update is drawn and compared. Its gradient by all steps is g; every row is E |g' - g|^2 / |g|^2 over repeated draws
of `score.steps` steps of each sample, for the gradients g' that an update would take.
"""

import argparse
from dataclasses import replace

import torch

from flashgrpo.assembly import Assembly
from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import single_process
from flashgrpo.learning.optim import GradientSum
from flashgrpo.learning.update import policy_update
from flashgrpo.models.lora import trained_parameters
from flashgrpo.scoring.scoring import untimed


class Kept(GradientSum):
    """Keeps the gradient, and leaves the weights as they are."""

    lr = 0.0

    def step(self) -> float:
        """Take the gradient."""
        self.taken = torch.cat([gradient.flatten() for gradient in self.take()])
        return 0.0


def main() -> None:
    """Print a row for each draw and chance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="tiny-masked-tokens")
    parser.add_argument("--repeats", type=int, default=40)
    given = parser.parse_args()
    config = RunConfig.load(given.recipe, ["out=runs/benchmark"])
    parts = Assembly(config, single_process())
    process, groups = parts.process, parts.prompt_groups(0)
    samples = [sample for group in groups for sample in group.samples]
    noise = torch.Generator().manual_seed(0)
    for parameter in trained_parameters(process.network).values():  # off the start, where half of the gradient is 0
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=noise)
    chosen = config.algorithm.score
    process.score = replace(chosen, chance="entropy")  # entropies are measured where they are asked for
    drawn = parts.draw_and_score(groups, untimed)
    state = drawn.record.state

    def gradient(score, seed):
        process.score = score
        record = process._record(samples, seed, state.unmasked, state.condition)
        compared = parts.compare(replace(drawn, record=record))
        optimizer = Kept(trained_parameters(process.network), parts.world)
        policy_update(process, parts.objective, optimizer, compared.record, config.optim, parts.world)
        return optimizer.taken

    whole = gradient(replace(chosen, draw="all"), 0)
    print(f"{chosen.steps} of {config.rollout.num_steps} steps, {len(samples)} samples, {given.repeats} draws each")
    for draw in ("independent", "stratified"):
        for chance in ("uniform", "entropy"):
            score = replace(chosen, draw=draw, chance=chance)
            found = torch.stack([gradient(score, 1 + number) for number in range(given.repeats)])
            apart = (found - whole).square().sum(1) / whole.square().sum()
            bias = (found.mean(0) - whole).square().sum() / whole.square().sum()
            error = apart.std() / given.repeats**0.5
            print(f"{draw:12} {chance:8} {apart.mean():.3f} +- {error:.3f}, of the mean {bias:.3f}")
    parts.rewards.close()


if __name__ == "__main__":
    main()
