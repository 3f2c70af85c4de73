"""The steps that are not trained: where they stop, what they cost, and that they never touch the one that is."""

import dataclasses
import gc
import weakref
from functools import partial

import pytest
import torch
from flashgrpo.processes.flow.policy import Policy

from flashgrpo.assembly import Assembly, experience
from flashgrpo.config import RunConfig
from flashgrpo.distributed.sharding import blocks_of
from flashgrpo.distributed.world import World, single_process
from flashgrpo.doctor.estimate import META, weightless
from flashgrpo.errors import UserError
from flashgrpo.learning.optim import Optimizer
from flashgrpo.learning.settings import OptimConfig
from flashgrpo.learning.update import policy_update
from flashgrpo.models.lora import trained_parameters
from flashgrpo.presets import DANCE_GRPO, FLASH_GRPO, FLOW_GRPO, FLOW_GRPO_FAST, FLOW_GRPO_FAST_2, Algorithm
from flashgrpo.processes.flow.cost import update_cost
from flashgrpo.processes.flow.float8 import Float8, frozen_layers
from flashgrpo.processes.flow.retain import Graphs
from flashgrpo.processes.flow.reuse import FirstBlock, TaylorSeer
from flashgrpo.processes.flow.rollout import denoise, initial_noise, rollout
from flashgrpo.processes.flow.schedule import shifted_grid
from flashgrpo.processes.flow.shortcuts import Environment, leaders, visited, within
from flashgrpo.processes.flow.solvers import Euler, UniPC
from flashgrpo.prompts import prompt_groups
from flashgrpo.run.progress import Clock
from flashgrpo.types import Prompt, PromptGroup, Sample

WORLD = single_process()
TEXTS = ["a red circle moving left slowly", "a blue square moving up quickly", "a green triangle moving down slowly"]
PROMPTS = [Prompt(text, {}) for text in TEXTS]


def mask(num_steps: int, *stochastic: int) -> torch.Tensor:
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


def test_guidance_within_an_interval():
    grid = shifted_grid(4, 3.0)  # 1, 0.9, 0.75, 0.5
    guidance = torch.full((4,), 2.0)
    assert within(guidance, grid, (0.75, 0.9)).tolist() == [1, 2, 2, 1]
    assert within(guidance, grid, (0.0, 1.0)).tolist() == [2, 2, 2, 2]


def test_leaders_are_of_the_same_group_and_steps():
    stochastic = torch.cat([mask(4, 1), mask(4, 1), mask(4, 2), mask(4, 1), mask(4, 2)])
    assert leaders([(0, 0), (0, 0), (0, 0), (1, 0), (0, 0)], stochastic).tolist() == [0, 0, 2, 3, 2]


def test_a_walk_over_some_points_is_a_walk_of_the_smaller_grid():
    grid = shifted_grid(10, 3.0)
    points = [0, 3, 4, 7]
    small = dataclasses.replace(grid, sigmas=grid.sigmas[[*points, 10]], timesteps=grid.timesteps[points])
    x = expected = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for solver in (Euler(), UniPC()):
        walk, plain = solver.walk(grid, points), solver.walk(small, range(4))
        for number, k in enumerate(points):
            v = torch.sin(x * (k + 1))
            x, expected = walk.step(k, x, v), plain.step(number, expected, v)
        assert torch.equal(x, expected)


def draw(model, algorithm: Algorithm, graphs: Graphs | None = None, micro_batch=64, size=4, steps=6, **cheap):
    grid = model.grid(steps)
    guidance = torch.full((steps,), 2.0)
    policy = Policy(model, grid, algorithm.noise(grid.sigmas), guidance, micro_batch=2)
    if cheap.pop("eight", False):
        cheap |= {"dtype": torch.bfloat16, "float8": Float8(blocks_of(model.network))}
    environment = Environment(model, grid, cheap.pop("guidance", guidance), **cheap)
    groups = [PromptGroup(0, number, prompt, size) for number, prompt in enumerate(PROMPTS)]
    samples = [Sample(group, member) for group in groups for member in range(size)]
    condition = model.encode([sample.group.prompt for sample in samples])
    latents, transitions = rollout(
        policy, environment, samples, condition, algorithm, 0, micro_batch, WORLD, graphs=graphs
    )
    return policy, latents, transitions


CHEAP = {
    "fewer": {"steps": 3},
    "unipc": {"solver": UniPC(), "steps": 3},
    "unguided": {"guidance": torch.ones(6)},
    "bfloat16": {"dtype": torch.bfloat16},
    "float8": {"eight": True},
    "first-block": {"reuse": FirstBlock(0.3)},
    "taylorseer": {"reuse": TaylorSeer(interval=2, order=1)},
    "all": {"solver": UniPC(), "steps": 2, "guidance": torch.ones(6), "eight": True},
}


@pytest.mark.parametrize("algorithm", [FLASH_GRPO, FLOW_GRPO_FAST], ids=["flash", "shared"])
@pytest.mark.parametrize("cheap", CHEAP.values(), ids=CHEAP)
def test_the_trained_step_is_exact_whatever_leads_to_it(make_model, algorithm, cheap):
    """Its density is that of a replay with the training network, bit for bit; and the videos remain videos."""
    model = make_model()
    _, exact, _ = draw(model, algorithm)
    policy, latents, transitions = draw(model, algorithm, **cheap)
    for step in transitions.k.unique().tolist():
        batch = transitions[transitions.k == step]
        v = policy.exact_velocity(batch.k, batch.x, batch.condition[batch.sample])
        assert torch.equal(policy.table.log_prob(batch.k, batch.x_next, batch.x, v), batch.log_prob)
    assert not torch.equal(latents, exact)
    assert torch.corrcoef(torch.stack([latents.flatten(), exact.flatten()]))[0, 1] > 0.8


def blocks_computed(model, environment: Environment, steps: int) -> int:
    """How often the last block runs in a walk of so many steps."""
    calls = []
    hook = model.network.blocks[-1].attn1.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    x = initial_noise(model, 0, [(0, 0, 0)], False)
    denoise(environment, x, model.encode(PROMPTS[:1]), 1, WORLD)
    hook.remove()
    return len(calls)


def test_products_in_float8(make_model):
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

    network = make_model().network
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


def test_reused_features_are_not_computed(make_model):
    model = make_model()
    grid = model.grid(9)
    plain = Environment(model, grid, torch.ones(9))
    assert blocks_computed(model, plain, 9) == 9
    every_second = dataclasses.replace(plain, reuse=TaylorSeer(interval=2, order=1))
    assert blocks_computed(model, every_second, 9) == 2 + 3  # two to begin with, then every second
    loose = dataclasses.replace(plain, reuse=FirstBlock(0.9))
    assert 1 <= blocks_computed(model, loose, 9) < 9
    assert not model.network.is_cache_enabled  # and nothing stays behind
    assert blocks_computed(model, plain, 9) == 9


def test_which_reuse_waits_for_the_device(make_run):
    """The meta device has no values to wait for."""
    model = weightless(make_run().model)
    noise = torch.zeros(1, *model.latent_shape, device=META)
    plain = Environment(model, model.grid(9), torch.ones(9))
    by_number = dataclasses.replace(plain, reuse=TaylorSeer(interval=2, order=1))
    by_value = dataclasses.replace(plain, reuse=FirstBlock(0.3))
    assert denoise(by_number, noise, model.nothing(), 1, World(META)).is_meta
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        denoise(by_value, noise, model.nothing(), 1, World(META))


def test_a_shared_start_is_computed_once(make_model):
    """And leads every member to the same latents, as it would by itself."""
    model = make_model()
    calls = []
    model.network.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    algorithm = dataclasses.replace(FLASH_GRPO, grouping=dataclasses.replace(FLASH_GRPO.grouping, shared_noise=True))
    _, together, transitions = draw(model, algorithm)
    x = transitions.x.unflatten(0, (3, 4))
    assert torch.equal(x, x[:, :1].expand_as(x))
    late = transitions.k.unflatten(0, (3, 4))[:, 0].tolist()
    assert max(late) > 0
    deterministic = sum(late) + sum(4 * (5 - k) for k in late)
    assert sum(calls) == 2 * (deterministic + 12)
    _, alone_, _ = draw(model, algorithm, micro_batch=1)
    torch.testing.assert_close(together, alone_, rtol=1e-3, atol=1e-4)


def test_evaluation_takes_no_shortcut(make_run):
    cheap = ["rollout.deterministic_steps=2", "rollout.guidance_interval=[0.5,0.9]", "rollout.solver.kind=unipc"]
    parts, plain = (Assembly(make_run(*settings), WORLD) for settings in (cheap, []))
    model = plain.policy.model
    noise = initial_noise(model, 0, [(0, 0, 0)], False)
    condition = model.encode(plain.heldout[:1])
    videos = [denoise(one.evaluator.environment, noise, condition, 1, WORLD) for one in (parts, plain)]
    assert torch.equal(*videos)
    assert parts.environment.steps == 2
    low = Assembly(make_run("rollout.deterministic_dtype=float8", "rollout.reuse.kind=taylorseer"), WORLD)
    for environment, used in ((low.environment, True), (low.evaluator.environment, False)):
        assert all((part is not None) == used for part in (environment.dtype, environment.float8, environment.reuse))
    assert set(parts.environment.guidance.tolist()) == {1.0, 1.5}


# ---- graphs that are kept --------------------------------------------------------------------------------------------


def gradient(model, policy, transitions, algorithm: Algorithm, **settings) -> dict[str, torch.Tensor]:
    config = OptimConfig(micro_batch=2, max_grad_norm=1e9, **settings)
    optimizer = Optimizer(trained_parameters(model.network), config, WORLD)
    seen: dict[str, torch.Tensor] = {}

    def read() -> float:
        seen.update({n: g.clone() for n, g in zip(optimizer.parameters, optimizer._gradients, strict=True)})
        return 0.0

    optimizer.step = read
    advantages = torch.linspace(-1, 1, 12)
    metrics = policy_update(policy, optimizer, transitions, advantages, algorithm, config, WORLD)
    assert metrics["drift"] == 0
    return seen


@pytest.mark.parametrize("micro_batch", [64, 5])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "algorithm",
    [FLASH_GRPO, FLOW_GRPO, FLOW_GRPO_FAST_2, DANCE_GRPO, dataclasses.replace(FLASH_GRPO, kl_coef=0.1)],
    ids=["flash", "flow", "fast-2", "dance", "kl"],
)
def test_a_kept_graph_gives_the_gradient_of_a_replay(make_model, algorithm, micro_batch, checkpointing):
    """Bit for bit where a rollout's micro-batch holds all samples: then both compute in the same portions."""
    model = make_model()
    if checkpointing:
        model.network.enable_gradient_checkpointing()
        model.network.train()
    for parameter in trained_parameters(model.network).values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    policy, latents, replayed = draw(model, algorithm, micro_batch=micro_batch)
    _, same, kept = draw(model, algorithm, Graphs(1000, None), micro_batch=micro_batch)
    assert torch.equal(latents, same)
    assert kept.retained
    assert not replayed.retained
    expected = gradient(model, policy, replayed, algorithm)
    calls = []
    hook = model.network.register_forward_pre_hook(lambda module, inputs: calls.append(torch.is_grad_enabled()))
    got = gradient(model, policy, kept, algorithm)
    hook.remove()
    assert not any(calls)  # nothing is replayed; a KL's reference is computed without gradient
    for name, value in expected.items():
        if micro_batch == 64:
            assert torch.equal(got[name], value)
        torch.testing.assert_close(got[name], value, rtol=2e-3, atol=1e-3 * float(value.abs().max()) + 1e-12)


def test_weights_that_are_not_those_that_drew_show_with_kept_graphs_too(make_model):
    model = make_model()
    policy, _, kept = draw(model, FLASH_GRPO, Graphs(6, None))
    for parameter in trained_parameters(model.network).values():
        parameter.data += 0.02
    optimizer = Optimizer(trained_parameters(model.network), OptimConfig(micro_batch=2), WORLD)
    metrics = policy_update(policy, optimizer, kept, torch.linspace(-1, 1, 12), FLASH_GRPO, optimizer.config, WORLD)
    assert metrics["drift"] > 0


def test_graphs_that_do_not_fit_are_dropped(make_model):
    model = make_model()
    graphs = Graphs(6, 1000)
    alive = []
    forward = model.network.register_forward_hook(lambda module, inputs, result: alive.append(result[0].requires_grad))
    _, _, transitions = draw(model, FLASH_GRPO, graphs)
    forward.remove()
    assert not graphs.kept
    assert graphs.bytes_each > 1000
    assert not transitions.retained
    assert sum(alive) == 1  # it is found out with one call of the network, not with all that act at a step
    enough = Graphs(6, 6 * graphs.bytes_each)
    _, _, transitions = draw(model, FLASH_GRPO, enough)
    assert enough.kept
    assert sum(len(one.rows) for one in transitions.retained) == 12
    assert not transitions[torch.arange(3)].retained
    draw(model, FLASH_GRPO, enough)
    assert enough.kept  # each update anew
    underrated = Graphs(1, 5 * graphs.bytes_each)  # more calls than were foreseen, as where micro-batches are filled up
    _, _, transitions = draw(model, FLASH_GRPO, underrated)
    assert not underrated.kept
    assert not transitions.retained


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


def test_when_graphs_are_kept(make_run):
    assert Assembly(make_run(), WORLD).graphs is not None
    assert Assembly(make_run("rollout.retain=false"), WORLD).graphs is None
    assert Assembly(make_run("optim.minibatches=2"), WORLD).graphs is None
    for other, why in (
        ("optim.minibatches=2", "a rollout that serves several optimizer steps"),
        ("model.offload=true", "the network leaves the device"),
        ("parallel.context=2", "replay together"),
        ("model.compute_dtype=bfloat16", "replay together"),
    ):
        with pytest.raises(UserError, match=rf"rollout\.retain: .*{why}"):
            RunConfig.load("tiny", [other, "rollout.retain=true"])
    assert Assembly(make_run("rollout.retain=true"), WORLD).graphs._limit is None


# ---- settings and cost -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("rollout.deterministic_steps=0", "greater than or equal to 1"),
        ("rollout.reuse={kind: taylorseer, interval: 1}", "interval must be at least 2"),
        ("rollout.reuse={kind: first-block, threshold: 2}", "between 0 and 1"),
        ("rollout.guidance_interval=[0.9,0.5]", "low <= high"),
        ("rollout.guidance_interval=[0,1.5]", "less than or equal to 1"),
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
    parts.policy.model.network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    drawn = experience(parts, prompt_groups(parts.prompts, config.seed, 1, 2, 2), Clock())
    assert sum(rows) == update_cost(config, 1, parts.guided).rollout
    assert drawn.transitions.retained
