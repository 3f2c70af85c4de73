"""The only denoising loop: prompt groups -> latents, and the transitions that the update will replay."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from flashgrpo.policy import Policy
from flashgrpo.presets import Algorithm
from flashgrpo.schedule import Euler
from flashgrpo.seeds import normal
from flashgrpo.types import Condition, Latents, PromptGroup, Transitions


@torch.no_grad()
def rollout(
    policy: Policy,
    groups: Sequence[PromptGroup],
    condition: Condition,
    algorithm: Algorithm,
    solver: Euler,
    seed: int,
    micro_batch: int,
) -> tuple[Latents, Transitions]:
    """Draw every sample of the groups: stochastic where `algorithm.steps` says, deterministic elsewhere.

    Args:
        groups: P prompt groups of one update; their samples, B in all, are the rows, group by group.
        condition: a row per group.
        micro_batch: samples denoised at once; it changes speed and memory, and the videos at most in the last bits.

    Returns:
        Final latents (B, C, F, H, W), and the trained transitions in the order of the samples.
    """
    update, num_steps = groups[0].update, policy.grid.num_steps
    row_of_group = torch.tensor([row for row, group in enumerate(groups) for _ in range(group.size)])
    group_ids = torch.tensor([group.group for group in groups for _ in range(group.size)])
    members = torch.tensor([member for group in groups for member in range(group.size)])
    stochastic = algorithm.steps.mask(seed, update, group_ids, num_steps, members=members)
    trained = algorithm.steps.trained(seed, update, group_ids, num_steps, members=members)
    condition = condition[row_of_group]

    latents, records = [], []
    for rows in torch.arange(len(members)).split(micro_batch):
        names = [(update, int(group_ids[row]), int(members[row])) for row in rows]
        x = initial_noise(policy, seed, names, algorithm.grouping.shared_noise)
        x, transitions = _denoise(policy, solver, x, condition[rows], stochastic[rows], trained[rows], seed, names)
        latents.append(x)
        records += [(int(rows[row]), k, *rest) for row, k, *rest in transitions]
    records.sort(key=lambda record: record[:2])  # by sample, then by step
    sample, k, x_k, x_next, log_prob = zip(*records, strict=True)
    return torch.cat(latents), Transitions(
        torch.tensor(sample), torch.tensor(k), torch.stack(x_k), torch.stack(x_next), torch.stack(log_prob), condition
    )


@torch.no_grad()
def denoise(policy: Policy, x: Latents, condition: Condition, solver: Euler) -> Latents:
    """Deterministic sampling of every row from its noise: evaluation, and `flashgrpo sample`."""
    never = torch.zeros(len(x), policy.grid.num_steps, dtype=torch.bool)
    return _denoise(policy, solver, x, condition, never, never, 0, [])[0]


def initial_noise(policy: Policy, seed: int, names: Sequence[tuple[int, int, int]], shared: bool) -> Latents:
    """x_0 of each sample, named (update, group, member); a group that shares it has its first member's."""
    shape = policy.model.latent_shape
    noise = [normal(shape, seed, "noise", update, group, 0 if shared else member) for update, group, member in names]
    return torch.stack(noise).to(policy.model.device)


def _denoise(
    policy: Policy,
    solver: Euler,
    x: Latents,
    condition: Condition,
    stochastic: Bool[Tensor, "batch steps"],
    trained: Bool[Tensor, "batch steps"],
    seed: int,
    names: Sequence[tuple[int, int, int]],
) -> tuple[Latents, list[tuple[int, int, Tensor, Tensor, Tensor]]]:
    """Walk the grid. Rows may differ in which steps are stochastic: each step serves the two kinds of rows in turn."""
    records = []
    for step in range(policy.grid.num_steps):
        x_next = torch.empty_like(x)
        for rows, is_stochastic in ((_rows(~stochastic[:, step]), False), (_rows(stochastic[:, step]), True)):
            if not len(rows):
                continue
            k = torch.full_like(rows, step)
            if is_stochastic:
                noise = torch.stack([normal(tuple(x.shape[1:]), seed, "step", *names[row], step) for row in rows])
                x_next[rows], log_prob = policy.act(k, x[rows], condition[rows], noise.to(x.device))
                records += [  # clones, for a view would keep the latents of the whole batch
                    (int(row), step, x[row].clone(), x_next[row].clone(), log_prob[i])
                    for i, row in enumerate(rows)
                    if trained[row, step]
                ]
            else:
                v = policy.velocity(k, x[rows], condition[rows])
                x_next[rows] = solver.step(policy.grid.sigmas, k, x[rows], v)
        x = x_next
    return x, records


def _rows(mask: Bool[Tensor, " batch"]) -> Int64[Tensor, " rows"]:
    return mask.nonzero().flatten()
