"""The steps that are not trained: where they stop, what they cost, and that they never touch the one that is."""

import dataclasses

import pytest
import torch
from torch import Tensor

from flashgrpo.assembly import Assembly
from flashgrpo.config import RunConfig
from flashgrpo.distributed.sharding import blocks_of
from flashgrpo.errors import UserError
from flashgrpo.models.load import META, weightless
from flashgrpo.presets import FLASH_GRPO, FLOW_GRPO_FAST
from flashgrpo.processes.flow.float8 import Float8, frozen_layers
from flashgrpo.processes.flow.network import GuidedNetwork, guidance_of
from flashgrpo.processes.flow.reuse import FirstBlock, TaylorSeer
from flashgrpo.processes.flow.rollout import MicroBatch, Start, noise_of, walk
from flashgrpo.processes.flow.schedule import shifted_grid
from flashgrpo.processes.flow.shortcuts import DeterministicSteps, leaders, visited
from flashgrpo.processes.flow.solvers import DpmSolver, Euler, UniPC
from flashgrpo.prompts import prompt_groups
from flashgrpo.run.progress import Clock
from tests.processes.flow.drawing import PROMPTS, WORLD, draw


def mask(num_steps: int, *stochastic: int) -> Tensor:
    row = torch.zeros(1, num_steps, dtype=torch.bool)
    row[0, list(stochastic)] = True
    return row


@pytest.mark.parametrize(
    ("num_steps", "stochastic", "steps", "points"),
    [
        (10, (3,), 4, [0, 2, 3, 4, 5, 7]),
        (10, (), 4, [0, 2, 5, 7]),
        (10, (9,), 2, [0, 5, 9]),
        (10, (0,), 1, [0, 1]),
        (10, (2, 3), 2, [0, 2, 3, 4, 5]),
        (6, (2,), None, [0, 1, 2, 3, 4, 5]),
        (6, (0, 1, 2, 3, 4), 1, [0, 1, 2, 3, 4, 5]),
        (6, (1,), 99, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_where_a_walk_stops(num_steps, stochastic, steps, points):
    assert visited(mask(num_steps, *stochastic), steps)[0].nonzero().flatten().tolist() == points


def test_guidance_within_an_interval(model):
    """Of deterministic steps only: a stochastic step is computed as it is replayed."""
    grid = shifted_grid(4, 3.0)  # 1, 0.9, 0.75, 0.5
    inside = guidance_of(model, grid, 2.0, interval=(0.75, 0.9))
    assert inside.deterministic.tolist() == [1, 2, 2, 1]
    assert inside.stochastic.tolist() == [2, 2, 2, 2]
    assert guidance_of(model, grid, 2.0, interval=(0.0, 1.0)).deterministic.tolist() == [2, 2, 2, 2]


def test_leaders_are_of_the_same_start():
    """The first row of each key, and the place of each row's among them."""
    first, of = leaders([(0, 0), (0, 0), (0, 1), (1, 0), (0, 1)])
    assert first.tolist() == [0, 2, 3]
    assert of.tolist() == [0, 0, 1, 2, 1]
    first, of = leaders(list("abac"))
    assert (first.tolist(), of.tolist()) == ([0, 1, 3], [0, 1, 0, 2])
    first, of = leaders([])
    assert len(first) == len(of) == 0


def test_a_walk_over_some_points_is_a_walk_of_the_smaller_grid():
    grid = shifted_grid(10, 3.0)
    points = [0, 3, 4, 7]
    small = dataclasses.replace(grid, sigmas=grid.sigmas[[*points, 10]], timesteps=grid.timesteps[points])
    x = expected = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for solver in (Euler(), UniPC(), DpmSolver()):
        path, plain = solver.walk(grid, points), solver.walk(small, range(4))
        for number, k in enumerate(points):
            v = torch.sin(x * (k + 1))
            x, expected = path.step(k, x, v), plain.step(number, expected, v)
        assert torch.equal(x, expected)


UNIPC = {"solver": {"kind": "unipc"}}
CHEAP = {
    "fewer": {"deterministic_steps": 3},
    "unipc": {**UNIPC, "deterministic_steps": 3},
    "unguided": {"guidance_interval": (0.0, 0.0)},
    "bfloat16": {"deterministic_dtype": "bfloat16"},
    "float8": {"deterministic_dtype": "float8"},
    "first-block": {"reuse": {"kind": "first-block", "threshold": 0.3}},
    "taylorseer": {"reuse": {"kind": "taylorseer", "interval": 2, "order": 1}},
    "all": {**UNIPC, "deterministic_steps": 2, "guidance_interval": (0.0, 0.0), "deterministic_dtype": "float8"},
}


@pytest.fixture(scope="module", params=[FLASH_GRPO, FLOW_GRPO_FAST], ids=["flash", "shared"])
def exactly(loaded, request):
    """An algorithm, and the latents of its samples without any shortcut."""
    return request.param, draw(loaded, request.param)[1]


@pytest.mark.parametrize("cheap", CHEAP.values(), ids=CHEAP)
def test_the_trained_step_is_exact_whatever_leads_to_it(model, exactly, cheap):
    """Its density is that of a replay with the training network, bit for bit; and the videos remain videos."""
    algorithm, exact = exactly
    process, latents, record = draw(model, algorithm, **cheap)
    for slot in record.slot.unique():
        units = record[(record.slot == slot).nonzero().flatten()]
        for part in process.micro_batches(units):
            assert torch.equal(process.replay(part, ())[0][0], part.old)
    assert not torch.equal(latents, exact)
    assert torch.corrcoef(torch.stack([latents.flatten(), exact.flatten()]))[0, 1] > 0.8


def walk_alone(moves: DeterministicSteps, x: Tensor, condition) -> Tensor:
    """The end of a walk of one sample along the whole grid."""
    latents, features = torch.empty_like(x), moves.features()
    batch = MicroBatch(torch.tensor([0]), range(moves.network.grid.num_steps))

    def start(batch: MicroBatch) -> Start:
        return Start(x, condition, torch.tensor([0]))

    with torch.no_grad():
        for _ in walk(moves, features, batch, start, latents, lambda rows, end: None):
            pass
    features.forget()
    return latents


def blocks_computed(moves: DeterministicSteps) -> int:
    """How often the last block runs in a walk along the whole grid."""
    model, calls = moves.network.model, []
    hook = model.network.blocks[-1].attn1.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    walk_alone(moves, noise_of(model, [(0, "noise", 0, 0, 0)]), model.encode(PROMPTS[:1]))
    hook.remove()
    return len(calls)


def test_products_in_float8(model):
    """Of the frozen layers of the blocks, as near as e4m3 is; nothing of it stays in the network."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(48, 32, dtype=torch.bfloat16), torch.randn(2, 5, 48).bfloat16()
    x[0, 0] *= 1000  # a row has a scale of its own
    x[0, 1] = 0
    layer.requires_grad_(False)
    exact = layer(x)
    with Float8([layer])():
        near = layer(x)
    assert near.dtype == exact.dtype
    assert not torch.equal(near, exact)
    assert float(((near - exact).norm(dim=-1) / exact.norm(dim=-1)).max()) < 1 / 16  # as far as one rounding may be off
    assert torch.equal(near[0, 1], layer.bias)
    assert torch.equal(layer(x), exact)

    network = model.network
    layers = frozen_layers(blocks_of(network))
    inside = [part for block in network.blocks for part in block.modules() if type(part) is torch.nn.Linear]
    adapters = [part for part in inside if part.weight.requires_grad]
    assert adapters
    assert len(layers) == len(inside) - len(adapters)
    state, inner = list(network.state_dict()), network.blocks[0].ffn.net[2]
    with Float8(blocks_of(network))():
        assert type(inner) is not torch.nn.Linear
    with pytest.raises(ValueError, match="mat_a"), Float8(blocks_of(network))():
        inner(torch.ones(1, 3))  # of another width
    assert type(inner) is torch.nn.Linear
    assert list(network.state_dict()) == state  # nothing of it is saved


def test_compiled_blocks_in_float8_are_compiled_once():
    """Not once for each of them, which the compiler gives up after a few."""
    torch.compiler.reset()
    layers = [torch.nn.Linear(32, 32).requires_grad_(False) for _ in range(12)]
    compiled, x = [torch.compile(layer, backend="eager", dynamic=False) for layer in layers], torch.ones(2, 32)
    counters = torch._dynamo.utils.counters
    counters.clear()
    with Float8(layers)():
        inside = [layer(x) for layer in compiled]
    outside = [layer(x) for layer in compiled]
    assert {y.dtype for y in inside} == {torch.bfloat16}
    assert {y.dtype for y in outside} == {torch.float32}
    assert counters["stats"]["unique_graphs"] <= 3
    torch.compiler.reset()


def test_float8_is_refused_where_it_cannot_be(make_run):
    eight = "rollout.deterministic_dtype=float8"
    for other in ("parallel.shard=2", "parallel.context=2", "model.offload=true", "model.compute_dtype=bfloat16"):
        with pytest.raises(UserError, match=r"rollout\.deterministic_dtype: float8 needs the network whole"):
            RunConfig.load("tiny", [eight, other])
    with pytest.raises(UserError, match="float8 is of frozen weights, full training has none"):
        make_run(eight, "model.train={kind: full}")
    with pytest.raises(UserError, match="takes frozen linear layers, and there are none"):
        Float8([torch.nn.Linear(3, 5)])


def unguided(model, steps: int) -> DeterministicSteps:
    """Deterministic steps without guidance or shortcuts."""
    return DeterministicSteps(GuidedNetwork(model, model.grid(steps), torch.ones(steps)))


def test_reused_features_are_not_computed(model):
    plain = unguided(model, 9)
    assert blocks_computed(plain) == 9
    every_second = dataclasses.replace(plain, reuse=TaylorSeer(interval=2, order=1))
    assert blocks_computed(every_second) == 2 + 3  # two to begin with, then every second
    loose = dataclasses.replace(plain, reuse=FirstBlock(0.9))
    assert 1 <= blocks_computed(loose) < 9
    assert not model.network.is_cache_enabled  # and nothing stays behind
    assert blocks_computed(plain) == 9


def test_which_reuse_waits_for_the_device(make_run):
    """The meta device has no values to wait for."""
    model = weightless(make_run().model)
    noise = torch.zeros(1, *model.latent_shape, device=META)
    plain = unguided(model, 9)
    by_number = dataclasses.replace(plain, reuse=TaylorSeer(interval=2, order=1))
    by_value = dataclasses.replace(plain, reuse=FirstBlock(0.3))
    assert walk_alone(by_number, noise, model.nothing()).is_meta
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        walk_alone(by_value, noise, model.nothing())


def test_a_shared_start_is_computed_once(model):
    """And leads every member to the same latents, as it would by itself."""
    calls = []
    hook = model.network.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    shared = dataclasses.replace(FLASH_GRPO, explore=dataclasses.replace(FLASH_GRPO.explore, shared_noise=True))
    _, together, record = draw(model, shared, size=4)
    hook.remove()
    x = record.state.x.unflatten(0, (3, 4))
    assert torch.equal(x, x[:, :1].expand_as(x))
    late = record.slot.unflatten(0, (3, 4))[:, 0].tolist()
    assert max(late) > 0
    deterministic = sum(late) + sum(4 * (5 - k) for k in late)
    assert sum(calls) == 2 * (deterministic + 12)
    _, alone, _ = draw(model, shared, size=4, micro_batch=1)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


def test_evaluation_takes_no_shortcut(make_run):
    cheap = ["rollout.deterministic_steps=2", "rollout.guidance_interval=[0.5,0.9]", "rollout.solver.kind=unipc"]
    parts, plain = (Assembly(make_run(*settings), WORLD) for settings in (cheap, []))
    names = [(0, "noise", 0, 0, 0)]
    ends = [one.process.sample(plain.heldout[:1], names, lambda rows, latents: None) for one in (parts, plain)]
    assert torch.equal(*ends)
    assert parts.process.moves.steps == 2
    assert isinstance(parts.process.moves.solver, UniPC)
    assert (parts.process.sampler().steps, parts.process.sampler().solver) == (None, Euler())
    low = Assembly(make_run("rollout.deterministic_dtype=float8", "rollout.reuse.kind=taylorseer"), WORLD).process
    for moves, used in ((low.moves, True), (low.sampler(), False)):
        shortcuts = moves.network.dtype, moves.network.float8, moves.reuse
        assert all((part is not None) == used for part in shortcuts)
    assert set(parts.process.moves.network.guidance.tolist()) == {1.0, 1.5}
    assert set(parts.process.sampler().network.guidance.tolist()) == {1.5}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("rollout.deterministic_steps=0", "must be at least 1, not 0"),
        ("rollout.reuse={kind: taylorseer, interval: 1}", "interval must be at least 2"),
        ("rollout.reuse={kind: first-block, threshold: 2}", "threshold must be from 1e-15 to 1, not 2"),
        ("rollout.guidance_interval=[0.9,0.5]", "low <= high"),
        ("rollout.guidance_interval=[0,1.5]", "must be at most 1, not 1.5"),
    ],
)
def test_settings_that_make_no_sense(override, sentence):
    with pytest.raises(UserError, match=sentence):
        RunConfig.load("tiny", [override])


@pytest.mark.parametrize("other", ["parallel.shard=2", "parallel.context=2", "model.compile=true"])
def test_reuse_is_refused_where_it_cannot_be(other):
    with pytest.raises(UserError, match=r"rollout\.reuse: "):
        RunConfig.load("tiny", ["rollout.reuse.kind=taylorseer", other])


@pytest.mark.parametrize(
    "settings",
    [
        ["rollout.deterministic_steps=2"],
        ["rollout.deterministic_steps=3", "rollout.solver.kind=unipc", "rollout.guidance_interval=[0.6,0.9]"],
        ["algorithm.grouping.shared_noise=true"],
        ["algorithm={preset: flow-grpo-fast-2, steps: {draw: stratified}}", "rollout.deterministic_steps=2"],
    ],
)
def test_the_cost_is_what_the_network_computes(make_run, settings):
    config = make_run("rollout.num_steps=6", "rollout.guidance_scale=2", "optim.micro_batch=1", *settings)
    parts = Assembly(config, WORLD)
    rows = []
    parts.process.network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    drawn = parts.draw_and_score(prompt_groups(parts.prompts, config.seed, 1, 2, 2), Clock())
    assert sum(rows) == parts.process.cost(config.seed, 1, 1, parts.objective.columns).rollout
    assert drawn.record.state.kept
