"""The only denoising loop: samples of prompt groups -> latents, and the transitions that the update will replay."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from flashgrpo.distributed import Team
from flashgrpo.policy import Policy
from flashgrpo.presets import Algorithm
from flashgrpo.seeds import normal
from flashgrpo.solvers import Solver
from flashgrpo.types import Condition, Latents, Sample, Transitions

Drawn = Callable[[Tensor, Latents], None]  # hears of the rows (B,) and latents of each micro-batch when it is done


def _nobody(rows: Tensor, latents: Latents) -> None:
    """Hears of what is drawn where nobody waits for it."""


@torch.no_grad()
def rollout(
    policy: Policy,
    samples: Sequence[Sample],
    condition: Condition,
    algorithm: Algorithm,
    solver: Solver,
    seed: int,
    micro_batch: int,
    team: Team,
    drawn: Drawn = _nobody,
) -> tuple[Latents, Transitions]:
    """Draw samples of one update: stochastic where `algorithm.steps` says, deterministic elsewhere.

    Args:
        samples: this rank's B samples; any part of the update's, also none.
        condition: a row per sample (at least one row where there is no sample).
        micro_batch: samples denoised at once; it changes speed and memory, and the videos at most in the last bits.
        drawn: hears of each micro-batch before the next is begun.

    Returns:
        Final latents (B, C, F, H, W), and the trained transitions in the order of the samples.
    """
    names, num_steps = [sample.name for sample in samples], policy.grid.num_steps
    numbers = torch.tensor(names, dtype=torch.int64).reshape(-1, 3)
    update, group_ids, members = int(numbers[0, 0]) if names else 0, numbers[:, 1], numbers[:, 2]
    stochastic = algorithm.steps.mask(seed, update, group_ids, num_steps, members=members)
    trained = algorithm.steps.trained(seed, update, group_ids, num_steps, members=members)
    shape, device = policy.model.latent_shape, policy.model.device

    latents, records = [torch.empty(0, *shape, device=device)], []
    parts = torch.arange(len(names)).split(micro_batch) if names else ()
    for rows, calls in _in_step(policy, stochastic, parts, team):
        mine = [names[row] for row in rows]
        x = initial_noise(policy, seed, mine, algorithm.grouping.shared_noise)
        x, transitions = _denoise(
            policy, solver, x, condition[rows], stochastic[rows], trained[rows], calls, seed, mine
        )
        latents.append(x)
        drawn(rows, x)
        records += [(int(rows[row]), k, *rest) for row, k, *rest in transitions]
    records.sort(key=lambda record: record[:2])  # by sample, then by step
    nothing = [torch.empty(0, *shape, device=device)] * 2 + [torch.empty(0, device=device)]
    x_k, x_next, log_prob = map(torch.stack, list(zip(*records, strict=True))[2:]) if records else nothing
    sample, k = (torch.tensor([record[i] for record in records], dtype=torch.int64) for i in (0, 1))
    return torch.cat(latents), Transitions(sample, k, x_k, x_next, log_prob, condition)


@torch.no_grad()
def denoise(
    policy: Policy,
    x: Latents,
    condition: Condition,
    solver: Solver,
    micro_batch: int,
    team: Team,
    drawn: Drawn = _nobody,
) -> Latents:
    """Deterministic sampling of every row from its noise: evaluation, and `flashgrpo sample`."""
    never = torch.zeros(len(x), policy.grid.num_steps, dtype=torch.bool)
    parts = torch.arange(len(x)).split(micro_batch) if len(x) else ()
    done = [torch.empty_like(x[:0])]
    for rows, calls in _in_step(policy, never, parts, team):
        done.append(_denoise(policy, solver, x[rows], condition[rows], never[rows], never[rows], calls, 0, [])[0])
        drawn(rows, done[-1])
    return torch.cat(done)


def initial_noise(policy: Policy, seed: int, names: Sequence[tuple[int, int, int]], shared: bool) -> Latents:
    """x_0 of each sample, named (update, group, member); a group that shares it has its first member's."""
    shape = policy.model.latent_shape
    noise = [normal(shape, seed, "noise", update, group, 0 if shared else member) for update, group, member in names]
    return torch.stack(noise or [torch.empty(0, *shape)]).reshape(-1, *shape).to(policy.model.device)


def _in_step(
    policy: Policy, stochastic: Bool[Tensor, "batch steps"], parts: Sequence[Tensor], team: Team
) -> list[tuple[Tensor, Tensor]]:
    """The micro-batches, each with the network calls that every rank makes at each step: (N, 2), by kind of step.

    Ranks that hold a network between them have to call it together, so all make as many calls as any rank needs; one
    with fewer samples gets empty micro-batches.
    """
    most = int(team.in_step(torch.tensor(len(parts))))
    calls = torch.zeros(most, policy.grid.num_steps, 2, dtype=torch.int64)
    for i, rows in enumerate(parts):
        count = stochastic[rows].sum(dim=0)
        calls[i, :, 0] = (count < len(rows)).long()
        calls[i, :, 1] = policy.calls(count)
    none = torch.empty(0, dtype=torch.int64)
    return list(zip([*parts, *[none] * (most - len(parts))], team.in_step(calls), strict=True))


def _denoise(
    policy: Policy,
    solver: Solver,
    x: Latents,
    condition: Condition,
    stochastic: Bool[Tensor, "batch steps"],
    trained: Bool[Tensor, "batch steps"],
    calls: Int64[Tensor, "steps 2"],
    seed: int,
    names: Sequence[tuple[int, int, int]],
) -> tuple[Latents, list[tuple[int, int, Tensor, Tensor, Tensor]]]:
    """Walk the grid. Rows may differ in which steps are stochastic: each step serves the two kinds of rows in turn.

    Rows whose stochastic steps are the same go together in one walk of the solver.
    """
    records = []
    patterns, walk_of = stochastic.unique(dim=0, return_inverse=True)
    walks = [solver.walk(policy.grid) for _ in patterns]
    for step in range(policy.grid.num_steps):
        x_next = torch.empty_like(x)
        for rows, is_stochastic in ((_rows(~stochastic[:, step]), False), (_rows(stochastic[:, step]), True)):
            made = 0
            k = torch.full_like(rows, step)
            if len(rows) and is_stochastic:
                noise = torch.stack([normal(tuple(x.shape[1:]), seed, "step", *names[row], step) for row in rows])
                x_next[rows], log_prob = policy.act(k, x[rows], condition[rows], noise.to(x.device))
                made = int(policy.calls(torch.tensor(len(rows))))
                records += [  # clones, for a view would keep the latents of the whole batch
                    (int(row), step, x[row].clone(), x_next[row].clone(), log_prob[i])
                    for i, row in enumerate(rows)
                    if trained[row, step]
                ]
            elif len(rows):
                v = policy.velocity(k, x[rows], condition[rows])
                for number in walk_of[rows].unique().tolist():
                    together = _rows(walk_of[rows] == number)
                    x_next[rows[together]] = walks[number].step(step, x[rows[together]], v[together])
                made = 1
            for _ in range(int(calls[step, int(is_stochastic)]) - made):
                policy.idle(step)
        for walk, pattern in zip(walks, patterns, strict=True):
            if pattern[step]:
                walk.restart()
        x = x_next
    return x, records


def _rows(mask: Bool[Tensor, " batch"]) -> Int64[Tensor, " rows"]:
    return mask.nonzero().flatten()
