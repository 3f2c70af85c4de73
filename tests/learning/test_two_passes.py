"""Coupled objectives and scores of several addends: two passes give the gradient of one graph."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from flashgrpo.distributed.world import single_process
from flashgrpo.learning.optim import GradientSum
from flashgrpo.learning.settings import OptimConfig
from flashgrpo.learning.update import policy_update
from flashgrpo.types import Prompt, PromptGroup, Sample
from tests.fakes import Colour, InTwo, whole_score

WORLD = single_process(computes=False)


@dataclass(frozen=True)
class Competing:
    """Scores that compete inside their key: a softmax over the key's terms, as in KVPO (arXiv 2605.14278)."""

    tau: float = 0.5
    kl_coef: float = 0.0
    coupled: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False

    @property
    def columns(self):
        return ("kl",) if self.kl_coef else ()

    def losses(self, score, old, advantage, weight, columns):
        log_p = torch.zeros_like(score)
        for key in columns["key"].unique():
            own = (columns["key"] == key).float()
            log_p = log_p + own * (score / self.tau - torch.logsumexp((score / self.tau)[own > 0], 0))
        penalty = self.kl_coef * columns["kl"] if self.kl_coef else 0.0
        return -weight * advantage * log_p + penalty

    def metrics(self, score, old, advantage, columns):
        return {"moved": float((score - old).abs().max())}


class Gradients(GradientSum):
    """Keeps the gradient."""

    lr = 0.0

    def step(self) -> float:
        self.kept = [gradient.clone() for gradient in self.take()]
        return 0.0


def drawn(process):
    groups = [PromptGroup(0, g, Prompt(text, {}), 3) for g, text in enumerate(("a red wall", "a blue door"))]
    _, record = process.draw([Sample(g, m) for g in groups for m in range(3)], 0, lambda rows, outputs: None, 2)
    noise = torch.randn(len(record.old), generator=torch.Generator().manual_seed(1))
    return replace(record, advantage=noise)


def one_graph(process, record, objective) -> list[Tensor]:
    """The gradient of the mean loss, all scores and columns in one graph."""
    columns = {"key": record.key}
    if objective.columns:
        columns["kl"] = sum(one["kl"] for _, one in process.replay(record, ("kl",)))
    losses = objective.losses(whole_score(process, record), record.old, record.advantage, record.weight, columns)
    return list(torch.autograd.grad(losses.mean(), list(process.network.parameters())))


@pytest.mark.parametrize("kind", [Colour, InTwo])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_two_passes_give_the_gradient_of_one_graph(kind, kl_coef, micro_batch):
    process, objective = kind(micro_batch=micro_batch), Competing(kl_coef=kl_coef)
    for parameter in process.network.parameters():  # off the base, whose KL has no gradient
        parameter.data += 0.1
    record = drawn(process)
    optimizer = Gradients(dict(process.network.named_parameters()), WORLD)
    metrics = policy_update(process, objective, optimizer, record, OptimConfig(), WORLD)
    for found, expected in zip(optimizer.kept, one_graph(process, record, objective), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert metrics["moved"] == 0.0


def test_one_graph_of_an_addend_is_alive_at_a_time():
    """The second addend is asked for when the first has been differentiated."""
    process, alive = InTwo(micro_batch=4), []

    class Watched(InTwo):
        def replay(self, record, columns):
            for score, extra in super().replay(record, columns):
                if score.requires_grad:
                    alive.append(score.grad_fn)
                yield score, extra
                if score.requires_grad:
                    with pytest.raises(RuntimeError, match="second time"):  # its graph has been used up
                        score.sum().backward()

    process = Watched(micro_batch=4)
    record = drawn(process)
    policy_update(
        process, Competing(), Gradients(dict(process.network.named_parameters()), WORLD), record, OptimConfig(), WORLD
    )
    assert len(alive) == 2 * 2


def test_ranks_exchange_the_scores_of_a_coupled_objective():
    """Two ranks with half of each key's terms sum up to the gradient of one rank that has them all."""
    whole = Colour(micro_batch=2)
    record, objective = drawn(whole), Competing()
    halves = [record[torch.tensor([0, 1, 3])], record[torch.tensor([2, 4, 5])]]
    expected, found = one_graph(whole, record, objective), []
    for rank in range(2):
        told: list[object] = []

        class Two(type(WORLD)):
            """Says what the other rank would."""

            def gather(self, value, rank=rank, told=told):
                told.append(value)
                other = halves[1 - rank]
                if isinstance(value, list):  # slots, terms and keys
                    theirs: object = [other.slot.tolist(), [1] * len(other), other.key.tolist()]
                elif "key" in value:
                    columns = {"score": whole_score(whole, other), "old": other.old, "advantage": other.advantage}
                    columns |= {"weight": other.weight, "key": other.key}
                    theirs = {name: column.tolist() for name, column in columns.items()}
                else:
                    theirs = {}
                return [value, theirs] if rank == 0 else [theirs, value]

            @property
            def data_rank(self, rank=rank):
                return rank

            def all_reduce_(self, gradients):
                """Each rank's part is looked at by itself."""

        world = Two(torch.device("cpu"), rank=rank, size=2)
        optimizer = Gradients(dict(whole.network.named_parameters()), world)
        policy_update(whole, objective, optimizer, halves[rank], OptimConfig(), world)
        found.append(optimizer.kept)
    for one, other, both in zip(*found, expected, strict=True):
        torch.testing.assert_close(one + other, both, rtol=1e-5, atol=1e-7)
