"""Graphs that are kept from rollout to update: the same gradient, measured before it is too much, and gone after."""

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor

from flashgrpo.assembly import Assembly
from flashgrpo.config import RunConfig
from flashgrpo.errors import UserError
from flashgrpo.learning.objective import Clipped
from flashgrpo.learning.optim import Optimizer
from flashgrpo.learning.settings import OptimConfig
from flashgrpo.learning.update import policy_update
from flashgrpo.models.lora import trained_parameters
from flashgrpo.presets import DANCE_GRPO, FLASH_GRPO, FLOW_GRPO, FLOW_GRPO_FAST_2
from flashgrpo.process import Record
from flashgrpo.processes.flow.process import FlowProcess
from flashgrpo.processes.flow.retain import Graphs
from flashgrpo.run.progress import Clock
from tests.processes.flow.drawing import WORLD, draw, draw_from, make_process, perturb, samples_of
from tests.processes.flow.test_rollout_update import judged


def with_graphs(model, graphs: Graphs) -> tuple[FlowProcess, Record]:
    """Draw 12 samples in three groups; their graphs are kept if these decide so."""
    process = make_process(model, FLASH_GRPO, retain=None)
    process.source.graphs = graphs
    return process, draw_from(process, samples_of(3, 4))[1]


def gradient(process: FlowProcess, record: Record, objective: Clipped) -> dict[str, Tensor]:
    """The gradient of one optimizer step, whose ratios all start at 1."""
    config = OptimConfig(max_grad_norm=1e9)
    optimizer = Optimizer(trained_parameters(process.network), config, WORLD)
    seen: dict[str, Tensor] = {}

    def read() -> float:
        seen.update(zip(optimizer.parameters, optimizer.take(), strict=True))
        return 0.0

    optimizer.step = read
    metrics = policy_update(process, objective, optimizer, record, config, WORLD)
    assert metrics["drift"] == 0
    return seen


@pytest.mark.parametrize("micro_batch", [64, 5])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("algorithm", "objective"),
    [
        (FLASH_GRPO, Clipped()),
        (FLOW_GRPO, Clipped()),
        (FLOW_GRPO_FAST_2, Clipped()),
        (DANCE_GRPO, Clipped()),
        (FLASH_GRPO, Clipped(kl_coef=0.1)),
    ],
    ids=["flash", "flow", "fast-2", "dance", "kl"],
)
def test_a_kept_graph_gives_the_gradient_of_a_replay(make_model, algorithm, objective, micro_batch, checkpointing):
    """Bit for bit where a rollout's micro-batch holds all samples: then both compute in the same portions."""
    model = make_model()
    if checkpointing:
        model.network.enable_gradient_checkpointing()
        model.network.train()
    perturb(model)
    advantages = torch.linspace(-1, 1, 6)
    process, latents, replayed = draw(model, algorithm, steps=5, micro_batch=micro_batch)
    keeping, same, kept = draw(model, algorithm, steps=5, micro_batch=micro_batch, retain=True)
    assert torch.equal(latents, same)
    assert not replayed.state.kept
    of_graphs = sum(len(one.units) for one in kept.state.kept)
    assert 0 < len(kept) - of_graphs <= 2  # one micro-batch is replayed all the same, which would show a drift
    expected = gradient(process, judged(replayed, advantages), objective)
    calls = []
    hook = model.network.register_forward_pre_hook(lambda module, inputs: calls.append(torch.is_grad_enabled()))
    got = gradient(keeping, judged(kept, advantages), objective)
    hook.remove()
    assert sum(calls) == 1  # nothing else is; a KL's reference is computed without gradient
    for name, value in expected.items():
        if micro_batch == 64:
            assert torch.equal(got[name], value)
        torch.testing.assert_close(got[name], value, rtol=2e-3, atol=1e-3 * float(value.abs().max()) + 1e-12)


def test_weights_that_are_not_those_that_drew_show_with_kept_graphs_too(model):
    process, record = with_graphs(model, Graphs(6, None))
    assert record.state.kept
    for parameter in trained_parameters(model.network).values():
        parameter.data += 0.02
    optimizer = Optimizer(trained_parameters(model.network), OptimConfig(), WORLD)
    record = judged(record, torch.linspace(-1, 1, 12))
    metrics = policy_update(process, Clipped(), optimizer, record, optimizer.config, WORLD)
    assert metrics["drift"] > 0


class Marked(torch.autograd.Function):
    """The identity, which leaves in the graph an object that lives as long."""

    @staticmethod
    def forward(ctx, x, mark):
        ctx.mark = mark
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Mark:
    """Lies in a graph."""


def test_graphs_that_do_not_fit_are_dropped(model):
    graphs = Graphs(6, 1000)
    marks: list[weakref.ref] = []
    alive = []  # graphs of earlier calls, at each call with a gradient

    def mark(module, inputs, result):
        if not result[0].requires_grad:
            return None
        alive.append(sum(one() is not None for one in marks))
        own = Mark()
        marks.append(weakref.ref(own))
        return (Marked.apply(result[0], own),)

    forward = model.network.register_forward_hook(mark)
    _, record = with_graphs(model, graphs)
    forward.remove()
    assert not graphs.kept
    assert graphs.bytes_each > 1000
    assert not record.state.kept
    assert len(alive) == 6
    assert max(alive) <= 1  # it is found out with one call of the network, not with all that act at a step
    assert not any(one() for one in marks)
    enough = Graphs(6, 6 * graphs.bytes_each)
    process, record = with_graphs(model, enough)
    assert enough.kept
    assert sum(len(one.units) for one in record.state.kept) == 12 - 2  # without the first micro-batch
    draw_from(process, samples_of(3, 4))
    assert enough.kept  # each update anew
    underrated = Graphs(1, 5 * graphs.bytes_each)  # more calls than were foreseen, as where micro-batches are filled up
    _, record = with_graphs(model, underrated)
    assert not underrated.kept
    assert not record.state.kept


def test_a_graph_is_of_all_its_units_or_gone(model):
    """A part of a record keeps the graphs that are of units within it, under their new numbers."""
    _, record = with_graphs(model, Graphs(6, None))
    whole = record.state.kept[0]
    units = whole.units.tolist()
    others = [unit for unit in range(len(record)) if unit not in units]
    assert not record[torch.tensor([units[0], *others[:1]])].state.kept
    turned = record[torch.tensor([others[0], units[1], units[0]])].state
    (same,) = turned.kept
    assert same.v is whole.v
    assert same.units.tolist() == [2, 1]
    assert turned.graph is None  # of some units only
    assert record[whole.units].state.graph is whole.v


def test_a_graph_that_was_measured_goes():
    """What autograd saves is measured, and not held."""
    layer, held = torch.nn.Linear(64, 64), []
    for _ in range(3):
        with Graphs(1, 1000).of(layer):
            y = layer(torch.ones(8, 64)).exp()  # saves its result, which has the graph
            lives_with_it = partial(max)
            y.grad_fn.register_hook(lives_with_it)
            held.append(weakref.ref(lives_with_it))
        del y, lives_with_it
    gc.collect()
    assert not any(node() for node in held)


@pytest.mark.parametrize(("setting", "kept"), [("updates=4", True), ("optim.minibatches=2", False)])
def test_a_run_keeps_graphs_for_one_optimizer_step(make_run, setting, kept):
    config = make_run("optim.micro_batch=1", setting)
    parts = Assembly(config, WORLD)
    drawn = parts.draw_and_score(parts.prompt_groups(0), Clock())
    assert bool(drawn.record.state.kept) == kept


def test_when_graphs_are_kept(model):
    """Where memory allows it, unless it is refused, or the rollout serves several optimizer steps."""
    few = {"groups": 1, "size": 2, "steps": 3, "exact": 1}
    process, _, record = draw(model, FLASH_GRPO, retain=None, **few)
    assert record.state.kept
    assert process.source.graphs._limit is not None
    assert not draw(model, FLASH_GRPO, retain=False, **few)[2].state.kept
    assert not draw(model, FLASH_GRPO, retain=None, uses=2, **few)[2].state.kept
    assert make_process(model, FLASH_GRPO, retain=True).source.graphs_for(0)._limit is None
    for other, why in (
        ("optim.minibatches=2", "a rollout that serves several optimizer steps"),
        ("model.offload=true", "the network leaves the device"),
        ("parallel.context=2", "replay together"),
        ("model.compute_dtype=bfloat16", "replay together"),
    ):
        with pytest.raises(UserError, match=rf"rollout\.retain: .*{why}"):
            RunConfig.load("tiny", [other, "rollout.retain=true"])
