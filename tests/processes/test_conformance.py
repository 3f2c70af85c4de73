"""What holds for every process (I1 to I8 of docs/design.md): a process that joins is one line of CASES.

The judge is autograd, arithmetic or the process itself on other rows; no test here knows what a process computes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn

from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import single_process
from flashgrpo.learning.experience import Compared, Drawn, compare
from flashgrpo.learning.objective import AnyObjective, Clipped, Competing, Contrast, KlMasked
from flashgrpo.learning.optim import GradientSum, Optimizer
from flashgrpo.learning.settings import Credit, OptimConfig
from flashgrpo.learning.update import policy_update
from flashgrpo.models.load import load_model
from flashgrpo.models.lora import trained_parameters
from flashgrpo.presets import AWM, DIFFUSION_NFT, FLASH_DPPO, FLASH_GRPO, FLOW_GRPO, MIX_GRPO, V_GRPO, Algorithm
from flashgrpo.process import Cost, Process, Record
from flashgrpo.processes.flow.choices import Recorded
from flashgrpo.processes.flow.model import VideoModel
from flashgrpo.processes.flow.process import FlowProcess
from flashgrpo.processes.flow.weighting import NormalizedRatio, StepLength
from flashgrpo.processes.programs.process import ProgramProcess
from flashgrpo.processes.programs.settings import CallTokens, ProgramRollout, ProgramRuns, ProgramSampling
from flashgrpo.processes.streaming.settings import Energy, NoisedBlock, OneLevel, Transition
from flashgrpo.processes.tokens.masked.process import MaskedProcess
from flashgrpo.processes.tokens.masked.settings import MaskedRollout, MaskedSampling, UnmaskedSteps, Unmasking
from flashgrpo.processes.tokens.uniform.process import UniformTokensProcess
from flashgrpo.processes.tokens.uniform.settings import TokensAtTimes, UniformRollout, UniformSampling, UniformTokens
from flashgrpo.types import Prompt, PromptGroup, RewardTable, Sample
from tests.conftest import EXACT
from tests.fakes import Colour, InTwo, Program, whole_score
from tests.programs import plan_and_draw, tiny_language_model
from tests.streams import ROUTED, Stream
from tests.tokens import TokenDouble, TokenPictures

WORLD = single_process()
PROMPTS = [Prompt("a red circle moving left slowly", {}), Prompt("a blue square moving up quickly", {})]
SIZE = 4
SAMPLES = [Sample(PromptGroup(3, g, prompt, SIZE), m) for g, prompt in enumerate(PROMPTS) for m in range(SIZE)]
ALL = range(len(SAMPLES))
SEED, UPDATE = 5, 3
OBJECTIVE = Clipped(clip_range=0.2)


@dataclass(frozen=True)
class Case:
    """A process with some options.

    Args:
        make: builds it with a micro-batch, for updates of PROMPTS with SIZE samples each, with the weights of the
            start; one that was made before may share them.
        exact: what I5 holds bit for bit: the others pass through calls of the network whose number of rows depends on
            what is drawn beside them (the deterministic steps of a walk), and may differ by rounding.
        anchored: builds it for groups with an anchor each; None where it draws none.
    """

    make: Callable[[int], Process]
    objective: AnyObjective = OBJECTIVE
    exact: frozenset[str] = frozenset({"old", "outputs", "evaluation"})
    anchored: Callable[[int], Process] | None = None


@cache
def tiny(*overrides: str) -> tuple[RunConfig, VideoModel, dict[str, Tensor]]:
    """The bundled model, loaded once, and what its trained weights start from."""
    update = ["rollout.num_steps=5", f"rollout.prompts={len(PROMPTS)}", f"rollout.group_size={SIZE}"]
    small = ["model.height=32", "model.width=32", "model.num_frames=5"]
    config = RunConfig.load("tiny", [*small, *update, *overrides])
    model = load_model(config.model, WORLD, config.seed, PROMPTS)
    return config, model, {name: weight.detach().clone() for name, weight in trained_parameters(model.network).items()}


def flow(algorithm: Algorithm, *overrides: str, exact: Sequence[str] = ()) -> Case:
    """The flow process with the bundled model."""

    def make(micro_batch: int) -> Process:
        config, model, start = tiny(*overrides)
        for name, weight in trained_parameters(model.network).items():
            weight.data.copy_(start[name])
        explore, score = algorithm.explore, algorithm.score
        return FlowProcess(model, explore, score, config.rollout, config.evaluation, micro_batch, WORLD)

    return Case(make, algorithm.objective, frozenset(exact))


def fake(kind: type) -> Case:
    return Case(lambda micro_batch: kind(micro_batch=micro_batch, prompts=len(PROMPTS), group_size=SIZE))


def stream(objective: AnyObjective, **how) -> Case:
    """Streaming video, with a model that fits on a page."""

    def make(micro_batch: int, anchored: bool = False) -> Process:
        return Stream(anchored, micro_batch, prompts=len(PROMPTS), group_size=SIZE, **how)

    case = Case(make, objective, frozenset({"old", "outputs"}))
    return replace(case, anchored=partial(make, anchored=True)) if objective.coupled else case


def masked(explore: Unmasking, score: UnmaskedSteps, objective: AnyObjective = OBJECTIVE, **rollout) -> Case:
    """Masked tokens, with a network that fits on a page."""
    sizes = {"prompts": len(PROMPTS), "group_size": SIZE, "micro_batch": 4, "num_steps": 2}

    def make(micro_batch: int) -> Process:
        how = MaskedRollout(**{**sizes, **rollout}), MaskedSampling()
        return MaskedProcess(TokenDouble(), explore, score, *how, micro_batch, WORLD)

    return Case(make, objective)


def uniform(score: TokensAtTimes, objective: AnyObjective = OBJECTIVE, **rollout) -> Case:
    """Uniform tokens, with a network that fits on a page."""
    sizes = {"prompts": len(PROMPTS), "group_size": SIZE, "num_steps": 4}

    def make(micro_batch: int) -> Process:
        how = UniformRollout(**sizes, micro_batch=micro_batch, **rollout), UniformSampling(num_steps=5)
        return UniformTokensProcess(TokenPictures(), UniformTokens(), score, *how, micro_batch, WORLD)

    return Case(make, objective)


def program(score: CallTokens, objective: AnyObjective = OBJECTIVE, explore=ProgramRuns(), **rollout) -> Case:  # noqa: B008
    """Programs, with a Llama of random weights."""

    def make(micro_batch: int) -> Process:
        sizes = {"prompts": len(PROMPTS), "group_size": SIZE, "micro_batch": micro_batch}
        how = ProgramRollout(**sizes, **rollout), ProgramSampling()
        model = tiny_language_model(adapters=how[0].adapter_names)
        return ProgramProcess(model, plan_and_draw, explore, score, *how, micro_batch, WORLD)

    return Case(make, objective)


GUARD = Recorded(StepLength(), NormalizedRatio())
CASES = {
    "flow: flash-grpo": flow(FLASH_GRPO, *EXACT),
    "flow: flash-grpo, a walk at a time": flow(
        FLASH_GRPO, *EXACT, "rollout.micro_batch=1", exact=["old", "outputs", "evaluation"]
    ),
    "flow: flash-grpo with shortcuts": flow(FLASH_GRPO),
    "flow: flash-grpo with a penalty": flow(replace(FLASH_GRPO, objective=Clipped(kl_coef=0.1)), *EXACT),
    "flow: flash-dppo": flow(replace(FLASH_DPPO, objective=KlMasked(tau=0.0)), *EXACT),
    "flow: flow-grpo": flow(FLOW_GRPO, *EXACT, exact=["old"]),
    "flow: mix-grpo, normalized ratio": flow(replace(MIX_GRPO, score=GUARD), *EXACT),
    "flow: awm": flow(
        replace(AWM, score=replace(AWM.score, times=2), objective=replace(AWM.objective, clip_range=0.2)), *EXACT
    ),
    "flow: v-grpo, guided": flow(
        replace(V_GRPO, score=replace(V_GRPO.score, times=2, guidance_scale=2.0)), *EXACT, "rollout.micro_batch=1"
    ),
    "flow: diffusion-nft": flow(
        replace(DIFFUSION_NFT, score=replace(DIFFUSION_NFT.score, times=2)), "rollout.solver.kind=dpm"
    ),
    "masked tokens: agrpo": masked(Unmasking(temperature=0.6, top_k=6, top_p=0.9), UnmaskedSteps(2), block=4),
    "masked tokens: by entropy, guided, masked by divergence, a penalty": masked(
        Unmasking("entropy"),
        UnmaskedSteps(2, "independent", "entropy"),
        KlMasked(tau=0.0, kl_coef=0.1),
        guidance_scale=2.0,
        schedule="cosine",
        num_steps=3,
    ),
    "programs: mmgrpo": program(CallTokens(), Clipped(clip_range=0.2, kl_coef=0.1)),
    "programs: adapters of modules": program(
        CallTokens(), Clipped(clip_range=0.2, kl_coef=0.1), adapters={"plan": "planner"}
    ),
    "programs: f-grpo, truncated": program(
        CallTokens("phase", "sequence"), explore=ProgramRuns(0.8, 6, 0.95), phases={"first": "1", "second": "2"}
    ),
    "colour": fake(Colour),
    "program": fake(Program),
    "addends": fake(InTwo),
    "addends with a penalty": replace(fake(InTwo), objective=Clipped(kl_coef=0.1)),
    "streaming: kvpo": stream(Competing(tau=0.2)),
    "streaming: all levels in x0, with a penalty": stream(
        Competing(tau=0.2, kl_coef=0.1), explore=replace(ROUTED, plan="independent"), score=Energy("x0", 2)
    ),
    "streaming: a short first block, along a straight line": stream(Competing(tau=0.2), first=1),
    "streaming: one level, with a penalty": stream(
        Clipped(clip_range=0.2, kl_coef=0.1), explore=OneLevel(), score=Transition()
    ),
    "streaming: a block that is noised again": stream(Contrast(beta=0.5), explore=OneLevel(), score=NoisedBlock()),
    "streaming: a block that is noised again, clipped, with penalties": stream(
        Clipped(clip_range=0.2, kl_coef=0.1, average_coef=0.1), explore=OneLevel(), score=NoisedBlock("t2")
    ),
    "uniform tokens": uniform(TokensAtTimes(times=2, starts=2)),
    "uniform tokens: guesses of the sampler, with a penalty": uniform(
        TokensAtTimes(times=2, starts=2, state="sampler", action="guess"),
        Clipped(clip_range=0.2, kl_coef=0.05),
        path={"kind": "mixture"},
        jumps="derivative",
    ),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


# ---- what the tests have in common -----------------------------------------------------------------------------------


def trained(case: Case, micro_batch: int = 3) -> Process:
    """The process with weights off their start, where half of an adapter's gradient vanishes; the same each time."""
    process, noise = case.make(micro_batch), torch.Generator().manual_seed(1)
    for parameter in trained_parameters(process.network).values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=noise)
    return process


def draw(
    process: Process, which: Sequence[int] = ALL, uses: int = 2, columns: Sequence[str] = ()
) -> tuple[Tensor, Record]:
    """Some of SAMPLES; the advantage of each term is its number, by which the tests tell terms apart."""
    told: dict[int, Tensor] = {}
    outputs, record = process.draw(
        [SAMPLES[number] for number in which],
        SEED,
        lambda rows, drawn: told.update(zip(rows.tolist(), drawn.clone(), strict=True)),
        uses,
        columns,
    )
    assert sorted(told) == list(range(len(which)))
    assert all(torch.equal(told[row], outputs[row]) for row in told)
    return outputs, replace(record, advantage=torch.arange(len(record.weight)).float())


def whole_columns(process: Process, part: Record, columns: Sequence[str]) -> dict[str, Tensor]:
    """The scores of a micro-batch, and its columns, as the sums of their addends, with their graphs."""
    addends = [{"score": score, **found} for score, found in process.replay(part, columns)]
    return {name: sum(addend[name] for addend in addends) for name in addends[0]}


def by_slot(record: Record) -> list[Record]:
    return [record[(record.slot == slot).nonzero().flatten()] for slot in record.slot.unique()]


def replayed(process: Process, record: Record, parts: Sequence[Record] | None = None) -> Tensor:
    """The score of each term, (T,), and that each was replayed once; in the process's own micro-batches by default."""
    parts = parts or [part for slot in by_slot(record) for part in process.micro_batches(slot)]
    scores = torch.full_like(record.advantage, torch.nan)
    for part in parts:
        assert len(part) <= process.micro_batch
        score = whole_score(process, part)
        assert score.requires_grad
        assert score.shape == part.advantage.shape
        assert scores[part.advantage.long()].isnan().all()
        scores[part.advantage.long()] = score.detach()
    assert not scores.isnan().any()
    return scores


class Gradients(GradientSum):
    """Stands in for the optimizer: keeps the gradient, and leaves the weights as they are."""

    lr = 0.0

    def step(self) -> float:
        self.taken = dict(zip(self.parameters, self.take(), strict=True))
        return 0.0


def gradients(process: Process, objective: AnyObjective, record: Record) -> tuple[dict[str, Tensor], dict]:
    """The gradient of one optimizer step, and the update's metrics."""
    optimizer = Gradients(trained_parameters(process.network), WORLD)
    metrics = policy_update(process, objective, optimizer, record, OptimConfig(), WORLD)
    return optimizer.taken, metrics


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], relative: float) -> None:
    assert any(gradient.any() for gradient in one.values())
    for name, expected in other.items():
        allowed = relative * float(expected.abs().max()) + 1e-9
        torch.testing.assert_close(one[name], expected, rtol=2 * relative, atol=allowed)


def judged(record: Record) -> Record:
    """With advantages of both signs, none of them 0."""
    signs = torch.tensor([1.0, -0.5]).repeat(len(record.weight))[: len(record.weight)]
    return replace(record, advantage=signs * (1 + torch.arange(len(record.weight)) % 3))


def plain(objective: AnyObjective) -> AnyObjective:
    return replace(objective, kl_coef=0.0, average_coef=0.0)


def rewards(process: Process, values: Callable[[int], Tensor], count: int) -> RewardTable:
    """A component for each channel."""
    names = tuple(process.channels)
    columns = torch.stack([values(number) for number in range(len(names))], dim=1).double()
    assert columns.shape == (count, len(names))
    return RewardTable(names, columns, torch.ones(len(names), dtype=torch.float64), channels=names)


def compared(process: Process, values: Callable[[int], Tensor], credit: Credit, which=ALL) -> Compared:
    outputs, record = draw(process, which)
    return compare(
        Drawn(UPDATE, 0, outputs, record, rewards(process, values, len(which))), process.channels, credit, WORLD
    )


# ---- the protocol ----------------------------------------------------------------------------------------------------


def test_it_is_a_process(case, tmp_path):
    process = case.make(3)
    assert isinstance(process, Process)
    outputs, record = draw(process)
    media = process.media(outputs, None)
    assert len(media) == len(SAMPLES)
    if isinstance(media, list):
        assert all(isinstance(text, str) for text in media)
    else:
        assert media.shape[2] == 3
        assert float(media.min()) >= 0
        assert float(media.max()) <= 1
        assert process.media(outputs, 1).shape[1] >= 1
    stage, whole = process.stage(int(record.slot[0])), {id(weight) for weight in process.network.parameters()}
    assert {id(weight) for weight in stage.parameters()} <= whole
    assert process.stage(int(record.slot[0])) is stage
    assert any(addend.requires_grad for addend in process.idle(int(record.slot[0]), ("kl",)))
    tensors = {name: value.detach() for name, value in trained_parameters(process.network).items()}
    assert all((tmp_path / "lora" / name).is_file() for name in process.save_lora(tmp_path / "lora", tensors))


def test_the_record_is_in_order(case):
    _, record = draw(case.make(3))
    assert record.unit.diff().min() >= 0
    assert record.unit.unique().tolist() == list(range(len(record)))
    assert record.sample.unique().tolist() == list(range(len(SAMPLES)))
    assert set(record.channel.tolist()) <= set(range(len(case.make(3).channels)))
    assert all(column.isfinite().all() for column in (record.old, record.weight))
    # whoever is compared is of one prompt group
    group = torch.tensor([SAMPLES[sample].group.group for sample in record.sample.tolist()])
    assert all(len(group[record.key == key].unique()) == 1 for key in record.key.unique())


def test_a_rank_without_samples_takes_part(case):
    process = case.make(3)
    outputs, record = draw(process, [])
    assert (len(outputs), len(record), len(record.old)) == (0, 0, 0)
    assert list(process.micro_batches(record)) == []


def test_the_reference_is_the_network_before_training(case):
    for make, moved in ((case.make, False), (lambda size: trained(case, size), True)):
        process = make(3)
        _, record = draw(process)
        part = process.micro_batches(by_slot(record)[0])[0]
        kl = distance_from_base(process, part, "score_base" if case.objective.coupled else "kl")
        assert kl.shape == part.old.shape
        assert bool((kl > 0).all()) if moved else bool((kl == 0).all())


def distance_from_base(process: Process, part: Record, column: str) -> Tensor:
    """A divergence, or how far the score is from that by the base model's weights; (T,)."""
    found = whole_columns(process, part, (column,))
    return found["kl"] if column == "kl" else (found["score"] - found[column]).abs()


def test_media_in_pieces_are_the_media(case):
    process = trained(case)
    prompt, name = Prompt("a red dot", {}), (0, "in pieces")
    (whole,) = process.media(process.sample([prompt], [name], lambda rows, outputs: None))
    pieces = list(process.stream(prompt, name))
    if isinstance(whole, str):
        assert pieces == [whole]
    else:
        torch.testing.assert_close(torch.cat(pieces), whole)
        assert len(pieces) == 1 or all(len(piece) > 1 for piece in pieces)


# ---- I1 to I8 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
@pytest.mark.parametrize("uses", [1, 2])
def test_i1_replayed_by_the_weights_that_drew_the_score_is_the_old_one(case, micro_batch, uses):
    process = trained(case, micro_batch)
    _, record = draw(process, uses=uses)
    old = draw(process, uses=2)[1].old if record.old is None else record.old
    assert torch.equal(replayed(process, record), old)


@pytest.mark.parametrize("uses", [1, 2])
def test_i2_at_ratio_one_the_gradient_is_that_of_the_weighted_scores(case, uses):
    """Of -sum(weight advantage score) / terms, and of the penalty where there is one, in one graph."""
    process = trained(case)
    record = judged(draw(process, columns=case.objective.columns)[1])
    parts = [part for slot in by_slot(record) for part in process.micro_batches(slot)]
    scored = [whole_columns(process, part, case.objective.columns) for part in parts]
    columns = {name: torch.cat([one[name] for one in scored]) for name in scored[0]}
    key, weight, advantage = (torch.cat([getattr(p, name) for p in parts]) for name in ("key", "weight", "advantage"))
    columns["key"] = key.unique(return_inverse=True)[1]
    log_ratio = case.objective.log_ratio(columns["score"], columns["score"].detach(), columns)
    loss = case.objective.penalized(-weight * advantage * log_ratio, columns).sum()
    parameters = trained_parameters(process.network)
    expected = torch.autograd.grad(loss / len(record.old), list(parameters.values()))
    again = judged(draw(process, uses=uses, columns=case.objective.columns)[1])
    gradient, metrics = gradients(process, case.objective, again)
    assert metrics["drift"] == 0
    assert_close(gradient, dict(zip(parameters, expected, strict=True)), relative=1e-4)


@pytest.mark.parametrize("std", ["group", "batch", "none"])
@pytest.mark.parametrize("combine", ["normalized", "raw"])
def test_i3_advantages_of_a_key_sum_to_zero(case, std, combine):
    noise = torch.randn(2, len(SAMPLES), generator=torch.Generator().manual_seed(0))
    credit = Credit(std=std, combine=combine, clip=1e6)
    result = compared(case.make(3), lambda number: noise[number], credit)
    pairs = torch.stack([result.key, result.channel]).unique(dim=1)
    for key, channel in pairs.T.tolist():
        own = (result.key == key) & (result.channel == channel)
        assert len(result.sample[own].unique()) == int(own.sum())
        assert abs(float(result.advantage[own].double().sum())) < 1e-5
        assert bool(result.advantage[own].any()) == (int(own.sum()) > 1)


@pytest.mark.parametrize("std", ["group", "batch", "none"])
def test_i3_flat_groups_and_groups_of_one_give_zero(case, std):
    """The first group is flat, the second has one sample."""
    which = [0, 1, 2, 3, 6]
    values = torch.tensor([0.3, 0.3, 0.3, 0.3, 0.9])
    result = compared(case.make(3), lambda number: values + number, Credit(std=std), which)
    assert not result.advantage.any()
    assert not result.record.advantage.any()
    assert result.flat_groups == len(torch.stack([result.key, result.channel]).unique(dim=1).T)


ANCHORED = [PromptGroup(3, g, prompt, SIZE, anchored=True) for g, prompt in enumerate(PROMPTS)]


def with_anchors(case: Case, values: Tensor, std: str) -> tuple[Process, Drawn, Compared]:
    """Draw all groups with their anchors, and compare samples by these rewards, of which the anchors' are the last."""
    if case.anchored is None:
        pytest.skip("draws no anchor")
    process, samples = case.anchored(1), [sample for group in ANCHORED for sample in group.samples]
    outputs, record = process.draw(samples, SEED, lambda rows, drawn: None, 2)
    last = torch.arange(SIZE, len(samples), SIZE + 1).repeat_interleave(SIZE + 1)
    table = rewards(process, lambda number: values.repeat(len(ANCHORED)) + number, len(samples))
    drawn = Drawn(UPDATE, 0, outputs, record, table, last)
    return process, drawn, compare(drawn, process.channels, Credit(baseline="anchor", std=std), WORLD)


@pytest.mark.parametrize("std", ["group", "group-and-anchor", "batch", "none"])
def test_i3_groups_that_are_all_like_their_anchor_give_zero(case, std):
    _, _, result = with_anchors(case, torch.full((SIZE + 1,), 0.3), std)
    assert not result.advantage.any()
    _, _, result = with_anchors(case, torch.tensor([*torch.linspace(0, 1, SIZE).tolist(), 2.0]), std)
    assert bool((result.advantage < 0).all())


def test_an_anchor_is_no_term_and_changes_nothing_of_its_group(case):
    process, drawn, result = with_anchors(case, torch.linspace(0, 1, SIZE + 1), "group")
    is_member = torch.arange(len(drawn.outputs)) % (SIZE + 1) < SIZE
    outputs, record = draw(process)
    assert_same(case, "outputs", drawn.outputs[is_member], outputs)
    assert torch.equal(drawn.record.old, record.old)
    assert result.sample.unique().tolist() == is_member.nonzero().flatten().tolist()
    assert len(drawn.members.total) == len(SAMPLES)
    with rows_counted(process.network) as rows:
        process.draw([sample for group in ANCHORED for sample in group.samples], SEED, lambda rows, drawn: None, 2)
    assert rows[0] == process.cost(SEED, UPDATE, 1, case.objective.columns, uses=2).rollout


def test_i4_a_clipped_term_has_no_derivative(case):
    """Terms whose ratios have gone too far in the direction of their advantage, others that have gone the other way."""
    if isinstance(case.objective, Contrast) or case.objective.coupled:
        pytest.skip("no ratio of its own")
    record = judged(draw(case.make(3), columns=case.objective.columns)[1])
    high = 2.0
    for shift, clips_positive in ((high, True), (-high, False), (90.0, True), (-90.0, False)):
        score = (record.old + shift).requires_grad_()
        columns = {name: torch.ones_like(score) for name in case.objective.columns}
        losses = case.objective.losses(score, record.old, record.advantage, record.weight, columns)
        (derivative,) = torch.autograd.grad(losses.sum(), score)
        clipped = (record.advantage > 0) == clips_positive
        assert (derivative[clipped] == 0).all()
        assert derivative[~clipped].all() or abs(shift) > high
    if isinstance(case.objective, Clipped):
        score = (record.old + case.objective.smallest_clip / 2).requires_grad_()
        losses = plain(case.objective).losses(score, record.old, record.advantage, record.weight, {})
        assert torch.autograd.grad(losses.sum(), score)[0].all()


def test_i4_a_clipped_share_has_no_derivative(case):
    """What its advantage is makes no difference, as long as it is clipped; the scores of others still reach it."""
    objective = case.objective
    if not objective.coupled:
        pytest.skip("terms are judged by themselves")
    record = judged(draw(case.make(3), columns=objective.columns)[1])
    key = record.key.unique(return_inverse=True)[1]
    score = (record.old + 0.1 * torch.randn(len(key), generator=torch.Generator().manual_seed(2))).requires_grad_()
    columns = {"key": key} | dict.fromkeys(objective.columns, record.old)
    log_ratio = objective.log_ratio(score, record.old, columns)
    low, high = objective.clip_range
    clipped = torch.where(record.advantage > 0, log_ratio.exp() > 1 + high, log_ratio.exp() < 1 - low)
    assert bool(clipped.any())
    assert not bool(clipped.all())
    found = []
    for factor in (1.0, 3.0):
        advantage = torch.where(clipped, factor * record.advantage, record.advantage)
        losses = objective.losses(score, record.old, advantage, record.weight, columns)
        found.append(torch.autograd.grad(losses.sum(), score, retain_graph=True)[0])
    assert torch.equal(*found)
    assert found[0].any()


def test_i4_where_all_terms_are_clipped_no_weight_has_a_gradient(case):
    if isinstance(case.objective, Contrast):
        pytest.skip("no ratio")
    process = trained(case)
    record = judged(draw(process, columns=case.objective.columns)[1])
    clipped = replace(record, old=record.old - 2 * record.advantage.sign())
    gradient, metrics = gradients(process, plain(case.objective), clipped)
    assert metrics["clip_fraction"] == 1
    assert all((one == 0).all() for one in gradient.values())


OTHERS = [6, 1, 4, 7, 3]  # some of the samples, in another order


def test_i5_a_sample_is_drawn_alike_whatever_is_drawn_beside_it(case):
    process = trained(case)
    (outputs, record), (some, part) = draw(process), draw(process, OTHERS)
    assert_same(case, "outputs", some, outputs[OTHERS])
    for row, number in enumerate(OTHERS):
        whole, own = (record.sample == number).nonzero().flatten(), (part.sample == row).nonzero().flatten()
        for name in ("key", "channel", "weight"):
            assert torch.equal(getattr(part, name)[own], getattr(record, name)[whole])
        assert torch.equal(part.slot[part.unit[own]], record.slot[record.unit[whole]])
        assert_same(case, "old", part.old[own], record.old[whole])


def test_i5_names_alone_say_what_is_drawn(case):
    process = trained(case)
    (outputs, record), (same, again) = draw(process), draw(process)
    assert torch.equal(outputs, same)
    assert torch.equal(record.old, again.old)
    other, _ = process.draw(SAMPLES, SEED + 1, lambda rows, drawn: None, 2)
    assert not torch.isclose(outputs, other).all()


def test_i5_evaluation_draws_by_name(case):
    process = trained(case)
    prompts = [sample.group.prompt for sample in SAMPLES]
    names = [(7, "evaluation", sample.group.group, sample.member) for sample in SAMPLES]

    def sampled(which) -> Tensor:
        told: list[int] = []
        drawn = process.sample(
            [prompts[n] for n in which], [names[n] for n in which], lambda r, _: told.extend(r.tolist())
        )
        assert sorted(told) == list(range(len(which)))
        return drawn

    whole = sampled(ALL)
    assert_same(case, "evaluation", sampled(OTHERS), whole[OTHERS])
    assert len(sampled([])) == 0
    assert not torch.isclose(whole[0], whole[1]).all()


def assert_same(case: Case, name: str, one: Tensor, other: Tensor) -> None:
    """Bit for bit, or up to the rounding of a walk in float32."""
    if name in case.exact:
        assert torch.equal(one, other)
    else:
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"passes": 2, "minibatches": 2}])
def test_i6_a_constant_reward_leaves_every_weight_as_it_is(case, settings):
    process = trained(case)
    result = compared(process, lambda number: torch.full((len(SAMPLES),), 0.7), Credit())
    config = OptimConfig(weight_decay=0.0, lr=0.1, **settings)
    optimizer = Optimizer(trained_parameters(process.network), config, WORLD)
    before = {name: weight.clone() for name, weight in optimizer.weights().items()}
    objective = plain(case.objective)
    metrics = policy_update(process, objective, optimizer, result.record, config, WORLD)
    assert metrics["grad_norm"] == 0
    assert optimizer.steps == config.passes * config.minibatches
    for name, weight in optimizer.weights().items():
        assert torch.equal(weight, before[name])
        assert torch.equal(optimizer.ema[name], before[name])


def test_a_reward_that_is_no_number_drops_its_keys_and_no_other(case):
    noise = torch.randn(2, len(SAMPLES), generator=torch.Generator().manual_seed(0))
    spoilt = noise.clone()
    spoilt[:, 1] = torch.nan
    process, credit = trained(case), Credit(std="group")
    sound, result = (compared(process, lambda number, own=own: own[number], credit) for own in (noise, spoilt))
    with_one = torch.isin(result.key, result.key[result.sample == 1])
    assert torch.equal(result.dropped, with_one)
    assert result.dropped_groups > 0
    assert torch.equal(result.advantage, torch.where(with_one, 0.0, sound.advantage))
    gradient, _ = gradients(process, case.objective, result.record)
    assert all(one.isfinite().all() for one in gradient.values())


def test_a_gradient_that_is_no_number_costs_one_step(case):
    process = trained(case)
    record = judged(draw(process, columns=case.objective.columns)[1])
    config = OptimConfig(lr=0.1)
    optimizer = Optimizer(trained_parameters(process.network), config, WORLD)
    before = {name: weight.clone() for name, weight in optimizer.weights().items()}
    hook = next(iter(optimizer.parameters.values())).register_hook(lambda gradient: gradient * torch.nan)
    metrics = policy_update(process, case.objective, optimizer, record, config, WORLD)
    hook.remove()
    assert (metrics["skipped_steps"], optimizer.steps, optimizer.skipped_in_a_row) == (1, 1, 1)
    assert all(torch.equal(weight, before[name]) for name, weight in optimizer.weights().items())
    metrics = policy_update(process, case.objective, optimizer, record, config, WORLD)
    assert "skipped_steps" not in metrics
    assert optimizer.skipped_in_a_row == 0
    assert not all(torch.equal(weight, before[name]) for name, weight in optimizer.weights().items())


def test_i7_order_and_partition_change_no_bit_of_a_score(case):
    process = trained(case)
    _, record = draw(process)
    generator = torch.Generator().manual_seed(3)
    shuffled = record[torch.randperm(len(record), generator=generator)]
    sizes = [1, 3, 2]
    parts = []
    for slot in by_slot(shuffled):
        rows, cut = torch.arange(len(slot)), 0
        while len(rows):
            size = sizes[cut % len(sizes)]
            parts.append(slot[rows[:size]])
            rows, cut = rows[size:], cut + 1
    assert torch.equal(replayed(process, record, parts), record.old)


def test_i7_order_changes_gradients_by_summation_only(case):
    process = trained(case)
    record = judged(draw(process, columns=case.objective.columns)[1])
    shuffled = record[torch.randperm(len(record), generator=torch.Generator().manual_seed(3))]
    expected, metrics = gradients(process, case.objective, record)
    gradient, others = gradients(process, case.objective, shuffled)
    assert_close(gradient, expected, relative=1e-4)
    assert others["drift"] == metrics["drift"] == 0
    assert others["transitions_by_step"] == metrics["transitions_by_step"]


def test_i7_the_micro_batch_changes_scores_and_gradients_by_rounding_only(case):
    process, other = trained(case), trained(case, micro_batch=2)
    _, record = draw(process)
    torch.testing.assert_close(replayed(other, record), record.old, rtol=1e-5, atol=1e-5)
    objective = case.objective
    if isinstance(objective, KlMasked):  # with tau 0 it masks by the sign of a ratio's rounding
        objective = replace(objective, tau=KlMasked().tau)
    expected, _ = gradients(process, objective, judged(record))
    gradient, _ = gradients(other, objective, judged(record))
    assert_close(gradient, expected, relative=1e-3)


@pytest.mark.parametrize("passes", [1, 2])
def test_i8_cost_is_what_the_network_computes(case, passes):
    """Rows that go through the network, a backward pass counted twice; with a micro-batch of 1 nothing is filled up."""
    process = trained(case, micro_batch=1)
    with rows_counted(process.network) as rows:
        record = judged(draw(process, columns=case.objective.columns)[1])
        drawn, rows[0] = rows[0], 0
        optimizer = Gradients(trained_parameters(process.network), WORLD)
        policy_update(process, case.objective, optimizer, record, OptimConfig(passes=passes), WORLD)
    assert process.cost(SEED, UPDATE, passes, case.objective.columns, uses=2) == Cost(drawn, rows[0])


@contextmanager
def rows_counted(network: nn.Module) -> Iterator[list[int]]:
    """A counter of rows; of all experts where the network is several."""
    rows = [0]

    def count(module, inputs, output):
        result = output[0] if isinstance(output, tuple) else output
        rows[0] += len(result)
        if result.requires_grad:
            result.register_hook(lambda gradient: rows.__setitem__(0, rows[0] + 2 * len(gradient)))

    parts = network.values() if isinstance(network, nn.ModuleDict) else [network]
    hooks = [part.register_forward_hook(count) for part in parts]
    yield rows
    for hook in hooks:
        hook.remove()
