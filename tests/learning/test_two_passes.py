"""Coupled objectives and scores of several addends: two passes give the gradient of one graph."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flashgrpo.distributed.world import single_process
from flashgrpo.learning.objective import Clipped, Competing
from flashgrpo.learning.optim import GradientSum
from flashgrpo.learning.settings import OptimConfig
from flashgrpo.learning.update import policy_update
from flashgrpo.process import Columns, Record
from flashgrpo.processes.streaming.cache import Context, KVCache
from flashgrpo.processes.streaming.source import StreamState
from flashgrpo.types import Prompt, PromptGroup, Sample
from tests.fakes import Colour, InTwo, Painted, Program
from tests.learning.toy import CPU, FirstOfTwo, SecondOfTwo
from tests.streams import BLOCK, CHANNELS, Stream

WORLD = single_process(computes=False)


class Gradients(GradientSum):
    """Keeps the gradient of each step."""

    lr = 0.0

    def __init__(self, process, world=WORLD):
        super().__init__(dict(process.network.named_parameters()), world)
        self.steps: list[list[Tensor]] = []

    def step(self) -> float:
        self.steps.append([gradient.clone() for gradient in self.take()])
        return 0.0


def drawn(process, off_policy: float = 0.0) -> Record:
    """Two groups of three, with noise for advantages, and old scores that lie so far from those of a replay."""
    groups = [PromptGroup(0, g, Prompt(text, {}), 3) for g, text in enumerate(("a red wall", "a blue door"))]
    _, record = process.draw([Sample(g, m) for g in groups for m in range(3)], 0, lambda rows, outputs: None, 2)
    noise = torch.randn(2, len(record.old), generator=torch.Generator().manual_seed(1))
    return replace(record, advantage=noise[0], old=record.old + off_policy * noise[1])


def moved(process):
    """Weights off the base, whose divergence has no gradient."""
    for parameter in process.network.parameters():
        parameter.data += 0.1
    return process


def in_float64(process, record: Record) -> Record:
    """The same process and record, computed in float64."""
    process.network.double()
    holder = process.model if isinstance(process, Stream) else process
    holder.base = {name: base.double() for name, base in holder.base.items()}
    state = record.state
    if isinstance(state, Painted):
        return replace(record, state=Painted(state.x.double(), state.action.double()))
    assert isinstance(state, StreamState)
    forks = [replace(fork, cache=cache_in_float64(fork.cache)) for fork in state.forks]
    return replace(record, state=replace(state, forks=forks, recorded=state.recorded.double()))


def cache_in_float64(cache: KVCache) -> KVCache:
    def double(context: Context) -> Context:
        return Context(*(tuple(one.double() for one in side) for side in (context.keys, context.values)))

    return KVCache(tuple(replace(block, written=double(block.written)) for block in cache.blocks))


def scored(process, record: Record, columns) -> dict[str, Tensor]:
    """Scores and columns of all terms with their graphs, as sums of their addends, slot by slot."""
    found: dict[str, list[Tensor]] = {}
    for slot in record.slot.unique():
        for part in process.micro_batches(record[(record.slot == slot).nonzero()[:, 0]]):
            addends = [{"score": score, **more} for score, more in process.replay(part, columns)]
            for name in addends[0]:
                found.setdefault(name, []).append(sum(addend[name] for addend in addends))
    order = torch.cat([(record.slot == slot).nonzero()[:, 0] for slot in record.slot.unique()]).argsort()
    return {name: torch.cat(values)[order] for name, values in found.items()}


def one_graph(process, record: Record, objective) -> list[Tensor]:
    """The gradient of the mean loss, all scores and columns in one graph."""
    columns: Columns = {"key": record.key, **scored(process, record, objective.columns)}
    known = (one.to(columns["score"].dtype) for one in (record.old, record.advantage, record.weight))
    losses = objective.losses(columns["score"], *known, columns)
    return list(torch.autograd.grad(losses.mean(), list(process.network.parameters())))


def updated(process, record: Record, objective, world=WORLD, **settings):
    optimizer = Gradients(process, world)
    metrics = policy_update(process, objective, optimizer, record, OptimConfig(**settings), world)
    return optimizer.steps, metrics


@pytest.mark.parametrize("kind", [Colour, InTwo, Stream])
@pytest.mark.parametrize("objective", [Competing(tau=0.5), Competing(tau=0.5, kl_coef=0.3), Clipped(clip_range=0.5)])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_two_passes_give_the_gradient_of_one_graph_to_the_last_digits(kind, objective, micro_batch):
    if kind is not Stream and objective.columns:
        pytest.skip("has no scores by the base")
    process = moved(kind(micro_batch=micro_batch))
    record = in_float64(process, drawn(process, off_policy=0.1))
    (found,), metrics = updated(process, record, objective)
    for one, expected in zip(found, one_graph(process, record, objective), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()) + 1e-16)
    assert metrics["ratio_max_dev"] > 0.01
    assert any(gradient.any() for gradient in found)


def test_penalties_of_addends_give_the_gradient_of_one_graph():
    process, objective = moved(InTwo(micro_batch=4)), Clipped(clip_range=0.5, kl_coef=0.3)
    record = in_float64(process, drawn(process, off_policy=0.1))
    (found,), _ = updated(process, record, objective)
    for one, expected in zip(found, one_graph(process, record, objective), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-14)


class Alive:
    """Counts matrices that graphs hold, and the most that there were at once."""

    def __init__(self):
        self.now = self.most = 0

    def __enter__(self):
        counter = self

        class Held:
            def __init__(self, tensor):
                self.tensor, self.counts = tensor.detach(), tensor.ndim > 1  # an output would hold its own graph
                counter.now += self.counts
                counter.most = max(counter.most, counter.now)

            def __del__(self):
                counter.now -= self.counts

        self.hooks = torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


@pytest.mark.parametrize("objective", [Competing(), Competing(kl_coef=0.1)])
def test_never_more_than_the_graph_of_one_forward_is_in_memory(objective):
    """Counted by the hooks for saved tensors, while any number of branches, blocks and levels is learnt from."""
    process = Stream(micro_batch=2)
    record, x = drawn(process), torch.zeros(2, CHANNELS, BLOCK, 1, 1)
    text = process.encode([Prompt("a", {})] * 2)
    with Alive() as one:
        score = process.model.velocity(x, 1.0, 0, None, text).square().sum()
    assert one.most > 0
    del score
    assert one.now == 0
    with Alive() as all_of_them:
        updated(process, record, objective, passes=2)
    assert 0 < all_of_them.most <= one.most
    assert all_of_them.now == 0


def test_a_second_pass_leaves_out_what_no_gradient_goes_through():
    """Scores by the base are replayed once."""
    asked = []

    class Watched(Stream):
        def replay(self, record, columns):
            asked.append((tuple(columns), torch.is_grad_enabled()))
            return super().replay(record, columns)

    process = Watched(micro_batch=8)
    record = drawn(process)
    asked.clear()
    updated(process, record, Competing(kl_coef=0.1))
    assert set(asked) == {(("score_base",), False), ((), True)}


@pytest.mark.parametrize("kind", [Colour, Stream])
def test_ranks_exchange_the_scores_of_a_coupled_objective(kind):
    """Two ranks with parts of each key sum up to the gradient of one that has them all; the third has nothing."""
    whole, objective = moved(kind(micro_batch=2)), Competing(tau=0.5)
    record = drawn(whole, off_policy=0.1)
    expected, terms = one_graph(whole, record, objective), []
    halves = [record[torch.tensor([0, 1, 3])], record[torch.tensor([2, 4, 5])]]
    for half in halves:
        known = {name: getattr(half, name) for name in ("old", "advantage", "weight", "key")}
        terms.append({name: one.tolist() for name, one in {**scored(whole, half, ()), **known}.items()})
    found = []
    for rank, kind_of_rank in ((0, FirstOfTwo), (1, SecondOfTwo)):
        other = halves[1 - rank]
        work = [other.slot.tolist(), [1] * len(other), other.key.tolist()]

        class Rank(kind_of_rank):
            """Keeps its own part of the gradient."""

            def all_reduce_(self, gradients):
                """Each rank's part is looked at by itself."""

        world = Rank(CPU, said=[work, terms[1 - rank], {}], **({"rank": 1} if rank else {}))
        (part,), metrics = updated(whole, halves[rank], objective, world)
        found.append(part)
        assert metrics["ratio_max_dev"] > 0.01
    for one, other, both in zip(*found, expected, strict=True):
        torch.testing.assert_close(one + other, both, rtol=1e-5, atol=1e-7)


def test_keys_stay_whole_in_every_optimizer_step():
    """Two keys are two steps at most, however many are asked for; each step sees its key alone."""
    process, objective = moved(Stream(micro_batch=2)), Competing(tau=0.5)
    record = in_float64(process, drawn(process))
    for minibatches in (2, 5):
        steps, metrics = updated(process, record, objective, minibatches=minibatches, passes=2)
        assert len(steps) == 4
        for key in (0, 1):
            part = record[(record.key == key).nonzero()[:, 0]]
            alone = one_graph(process, replace(part, key=torch.zeros_like(part.key)), objective)
            for one, expected in zip(steps[key], alone, strict=True):
                torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-14)
        assert metrics["ratio_mean"] == pytest.approx(1)  # keys of the second pass are others than those of the first
        assert metrics["largest_share"] < 0.9


def test_a_loss_that_is_no_number_reaches_all_parts():
    process = Stream(micro_batch=2)
    record = drawn(process)
    spoilt = replace(record, old=torch.where(record.key == 0, torch.nan, record.old))
    (found,), _ = updated(process, spoilt, Competing())
    assert not any(gradient.isfinite().any() for gradient in found)


def test_a_unit_whose_terms_have_several_keys_cannot_compete():
    process = Program(micro_batch=2)
    groups = [PromptGroup(0, g, Prompt("a red wall", {}), 3) for g in range(2)]
    _, record = process.draw([Sample(g, m) for g in groups for m in range(3)], 0, lambda rows, outputs: None, 2)
    record = replace(record, advantage=torch.ones(len(record.old)))
    assert record.one_key_each
    updated(process, record, Competing())
    mixed = replace(record, key=torch.arange(len(record.key)))
    assert not mixed.one_key_each
    with pytest.raises(AssertionError, match="part the terms of a key"):
        updated(process, mixed, Competing())
