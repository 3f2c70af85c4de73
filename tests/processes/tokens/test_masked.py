"""Masked tokens: states that steps have seen, what is scored of them, texts that end, and what is refused."""

from dataclasses import replace

import pytest
import torch

from flashgrpo.distributed.world import single_process
from flashgrpo.learning.objective import Clipped
from flashgrpo.processes.choices import log_probs, truncated
from flashgrpo.processes.tokens.guided import GuidedLogits
from flashgrpo.processes.tokens.masked.process import MaskedProcess
from flashgrpo.processes.tokens.masked.settings import MaskedRollout, MaskedSampling, Plan, UnmaskedSteps, Unmasking
from flashgrpo.processes.tokens.masked.unmasking import NEVER
from flashgrpo.types import Prompt, PromptGroup, Sample
from tests.tokens import TokenDouble

SAMPLES = [Sample(PromptGroup(0, group, Prompt(text, {}), 3), m) for group, text in enumerate("ab") for m in range(3)]
AGRPO = Unmasking(temperature=0.6, top_k=6, top_p=0.9)


EVERY, AS_DRAWN = UnmaskedSteps(draw="all"), MaskedSampling()


def process(explore=AGRPO, score=EVERY, model=None, micro_batch=4, sampling=AS_DRAWN, **how):
    rollout = MaskedRollout(**{"prompts": 2, "group_size": 3, "micro_batch": 4, "num_steps": 4, "block": 4, **how})
    return MaskedProcess(model or TokenDouble(), explore, score, rollout, sampling, micro_batch, single_process())


def draw(made, seed=1, uses=2):
    return made.draw(SAMPLES, seed, lambda rows, outputs: None, uses)


def by_part(made, record):
    return [(part, *made.replay(part, ())[0]) for part in made.micro_batches(record)]


# ---- what is scored --------------------------------------------------------------------------------------------------


def test_candidates_are_what_truncation_leaves():
    """Of logits (2, 1, 0, -3) at temperature .6: two candidates by top-k, two by top-p as .816 + .154 > .95."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -3.0]])
    for top_k, top_p in ((2, 1.0), (4, 0.95), (3, 0.9)):
        log_p, kept = truncated(logits, 0.6, top_k, top_p)
        assert kept.tolist() == [[0, 1, -1, -1][: top_k if top_p < 1 else 2]]
        assert log_p[0, 0].item() == pytest.approx(-0.173008, abs=1e-6)
        assert torch.equal(log_probs(logits, 0.6, kept), log_p)
    log_p, kept = truncated(logits, 0.6, None, 1.0)
    assert kept is None
    assert log_p[0, 0].item() == pytest.approx(-0.202769, abs=1e-6)


def test_the_loss_of_the_published_example():
    """Ratios 1.2214, 1 and .7408: the first is clipped at 1.2. Divided by 2 draws and 2 samples, not by 3 terms."""
    new = torch.tensor([-1.0, -0.5, -2.0], requires_grad=True)
    old, advantage = torch.tensor([-1.2, -0.5, -1.7]), torch.tensor([1.0, -1.0, 0.5])
    loss = Clipped(clip_range=0.2).losses(new, old, advantage, torch.tensor([2.0, 1.0, 0.5]), {}).sum() / 4
    loss.backward()
    assert loss.item() == pytest.approx(-0.396301, abs=1e-6)
    torch.testing.assert_close(new.grad, torch.tensor([0.0, 0.25, -0.046301]), rtol=0, atol=1e-6)


def test_a_score_is_the_log_probability_of_the_token_among_its_candidates_given_what_its_step_saw():
    made = process()
    tokens, record = draw(made)
    assert len(record.old) == len(SAMPLES) * 8
    for part, score, _ in by_part(made, record):
        state = part.state
        for unit in range(len(part)):
            row, step = int(state.sample[unit]), int(state.at[unit])
            seen = tokens[row].masked_fill(state.unmasked.step[row] >= step, 8)[None]
            condition = made.encode([SAMPLES[row].group.prompt])
            hidden = made.model.call(seen, condition, lambda hidden, head: head(hidden))[0]
            scores = score[part.unit == unit]
            places = (state.unmasked.step[row] == step).nonzero().flatten()
            assert len(scores) == len(places) == 2
            for value, place in zip(scores, places, strict=True):
                kept = [token for token in state.unmasked.kept[row, place].tolist() if token >= 0]
                assert int(tokens[row, place]) in kept
                log_p = (hidden[place][kept] / 0.6).log_softmax(0)
                torch.testing.assert_close(value, log_p[kept.index(int(tokens[row, place]))])


@pytest.mark.parametrize("order", ["random", "low-confidence", "entropy"])
def test_every_state_is_rebuilt_from_the_step_of_each_token(order):
    made = process(replace(AGRPO, order=order), model=TokenDouble(end=5))
    made.network.head.bias.data[5] = 2.0  # some texts end after the first block
    saw, unmasking = {}, made.sampler()[0]
    unmasking = replace(unmasking, order=order)
    condition = made.encode([sample.group.prompt for sample in SAMPLES])
    logits = lambda tokens, places: made.logits(tokens, places, condition)  # noqa: E731
    names = [(1, "x", *sample.name) for sample in SAMPLES]
    found = unmasking.draw(
        logits, names, 8, made.device, False, lambda step, tokens: saw.__setitem__(step, tokens.clone())
    )
    assert {2, 4} <= set(found.steps.tolist())
    record = made._record(SAMPLES, 1, found, condition)
    for part in made.micro_batches(record):
        for unit, seen in enumerate(made.scores.seen(part.state)):
            assert torch.equal(seen, saw[int(part.state.at[unit])][part.state.sample[unit]])
    assert not (found.tokens == 8).any()


def test_with_top_p_the_first_ratio_is_one():
    made = process()
    made.network.head.weight.data += 0.3
    _, record = draw(made)
    for part, score, _ in by_part(made, record):
        assert torch.equal(score, part.old)
    assert (record.state.unmasked.kept == -1).any()


def test_drawn_steps_stand_for_all():
    """The expected gradient of the scores, by enumeration of the drawn steps, is that of every step once."""
    every = process(score=UnmaskedSteps(draw="all"), explore=Unmasking())
    _, record = draw(every)
    of_step = torch.zeros(len(SAMPLES), 4)
    for part, score, _ in by_part(every, record):
        for unit in range(len(part)):
            of_step[part.state.sample[unit], part.state.at[unit]] = score[part.unit == unit].sum().detach()
    for chance in ("uniform", "entropy"):
        few = process(score=UnmaskedSteps(1, "independent", chance), explore=Unmasking())
        _, drawn = draw(few)
        assert torch.equal(drawn.state.unmasked.tokens, record.state.unmasked.tokens)
        entropies = drawn.state.unmasked.entropy if chance == "entropy" else torch.ones(len(SAMPLES), 4)
        p = entropies / entropies.sum(1, keepdim=True)
        step, weight = drawn.state.at, drawn.weight[::2]
        torch.testing.assert_close(weight, (0.25 / p[torch.arange(len(SAMPLES)), step]).float())
        expected = (p * (0.25 / p) * of_step).sum(1)
        torch.testing.assert_close(expected.float(), of_step.mean(1))


def test_mean_field_scores_the_same_tokens_with_everything_masked():
    exact, field = (process(score=UnmaskedSteps(draw="all", state=state)) for state in ("exact", "mean-field"))
    (tokens, record), (same, other) = draw(exact), draw(field)
    assert torch.equal(tokens, same)
    first = record.state.at[record.unit] == 0
    torch.testing.assert_close(other.old[first], record.old[first])
    assert not torch.isclose(other.old[~first], record.old[~first]).any()


def test_guidance_leads_away_from_the_empty_prompt():
    model = TokenDouble()
    tokens, places = torch.full((2, 8), 8), torch.tensor([[0, 5], [3, 1]])
    condition = model.encode([Prompt("a", {}), Prompt("b", {})])
    own, without, guided = (
        GuidedLogits(model, scale)(tokens, places, c)
        for scale, c in ((1.0, condition), (1.0, condition.replaced(model.nothing())), (3.0, condition))
    )
    torch.testing.assert_close(guided, without + 3 * (own - without))
    assert own.shape == (2, 2, 8)


def test_exact_divergences_beside_the_scores():
    made = process()
    _, record = made.draw(SAMPLES, 1, lambda rows, outputs: None, 2, ("kl_old",))
    for part in made.micro_batches(record):
        ((_, columns),) = made.replay(part, ("kl", "kl_old"))
        assert (columns["kl_old"] == 0).all()
        assert (columns["kl"] == 0).all()
    made.network.head.weight.data *= 1.5
    for part in made.micro_batches(record):
        ((_, columns),) = made.replay(part, ("kl", "kl_old"))
        torch.testing.assert_close(columns["kl"], columns["kl_old"])
        assert (columns["kl"] > 0).any()
        assert (columns["kl"] > -1e-6).all()


# ---- drawing ---------------------------------------------------------------------------------------------------------


def test_tokens_come_as_often_as_their_probabilities_say():
    """Chi-square of the first token of 600 samples of one step, 7 degrees of freedom; 24.3 is one in a thousand."""
    made = process(Unmasking(temperature=0.7), num_steps=1, block=None, micro_batch=300)
    prompts = [SAMPLES[0].group.prompt] * 600
    drawn = made.sample(prompts, [(9, "chi", number) for number in range(600)], lambda rows, outputs: None)
    logits = made.logits(torch.full((1, 8), 8), torch.zeros(1, 1).long(), made.encode(prompts[:1]))[0, 0]
    expected = 600 * (logits / 0.7).softmax(0)
    assert ((drawn[:, 0].bincount(minlength=8) - expected) ** 2 / expected).sum() < 24.3


def test_random_places_do_not_depend_on_the_policy():
    first, other = process(Unmasking()), process(Unmasking())
    other.network.mix.weight.data *= -3
    (one, record), (two, again) = draw(first), draw(other)
    assert not torch.equal(one, two)
    assert torch.equal(record.state.unmasked.step, again.state.unmasked.step)


def test_confident_places_come_first():
    made = process(Unmasking("entropy"), block=None, num_steps=8)
    made.network.mix.weight.data.zero_()  # so that a place is as sure whatever the others are
    made.network.mix.bias.data.copy_(torch.linspace(0, 4, 8).repeat_interleave(16))
    made.network.head.weight.data.copy_(torch.arange(8.0)[:, None].expand(-1, 16) / 16)
    _, record = draw(made)
    assert (record.state.unmasked.step == torch.arange(7, -1, -1)).all()


def test_blocks_are_finished_one_after_the_other():
    _, record = draw(process())
    assert (record.state.unmasked.step[:, :4] < 2).all()
    assert (record.state.unmasked.step[:, 4:] >= 2).all()


def test_a_mask_that_could_be_drawn_never_is():
    model = TokenDouble(mask=2)
    model.network.head.bias.data[2] = 20.0
    for explore in (AGRPO, Unmasking()):
        tokens, record = draw(process(explore, model=model))
        assert not (tokens == 2).any()
        assert record.old.isfinite().all()


def test_a_text_that_has_ended_is_filled_up_and_the_filler_is_no_term():
    model = TokenDouble(end=5)
    model.network.head.bias.data[5] = 30.0
    calls = []
    model.network.register_forward_hook(lambda *_: calls.append(1))
    made = process(model=model, score=UnmaskedSteps(3))
    tokens, record = draw(made, uses=1)
    assert (tokens == 5).all()
    assert len(calls) == 4  # 2 steps of the first block, for 2 micro-batches
    assert (record.state.unmasked.step[:, 4:] == NEVER).all()
    assert (record.state.at < 2).all()
    assert len(record.weight) == len(SAMPLES) * 3 * 2
    assert (record.weight == 1).all()


def test_evaluation_draws_as_it_is_told():
    prompts, names = [SAMPLES[0].group.prompt] * 3, [(0, "evaluation", number) for number in range(3)]
    greedy = process(sampling=MaskedSampling(temperature=0.0, order="low-confidence", num_steps=8, block=8))
    drawn = greedy.sample(prompts, names, lambda rows, outputs: None)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(*process().sample(prompts[:2], names[:2], lambda rows, outputs: None))


def test_order_by_the_policy_is_said_to_be_biased():
    tokens, record = draw(process())
    assert [one.level for one in process(Unmasking("entropy")).checks(record, tokens, 0, False)] == ["warning"]
    assert not process().checks(record, tokens, 0, False)


# ---- plans, and what is refused --------------------------------------------------------------------------------------


def test_steps_are_shared_out():
    assert Plan.of(24, 8, 12, "linear") == Plan(12, (3, 3, 3, 3), 2)
    assert Plan.of(8, 3, None, "linear").counts == (3, 3, 2)
    assert Plan.of(16, 4, None, "cosine").counts == (2, 3, 5, 6)
    assert Plan.of(5, 5, None, "cosine").counts == (1, 1, 1, 1, 1)
    assert Plan.of(24, 8, 12, "linear").at(5) == (slice(12, 24), 3)
    for tokens, steps in ((256, 12), (17, 16), (9, 4)):
        counts = Plan.of(tokens, steps, None, "cosine").counts
        assert sum(counts) == tokens
        assert min(counts) >= 1


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: process(block=3), r"rollout.block: 8 tokens cannot be cut into blocks of 3; the nearest size is 2"),
        (lambda: process(num_steps=3), r"rollout.num_steps: 3 steps cannot be shared out among 2 blocks"),
        (lambda: process(num_steps=10), r"rollout.num_steps: a block of 4 tokens has at most 4 steps"),
        (lambda: process(model=TokenDouble(mask=None)), r"this network has no mask token"),
        (lambda: process(sampling=MaskedSampling(block=5)), r"8 tokens cannot be cut into blocks of 5"),
        (lambda: Unmasking(top_p=0.0), r"top_p of Unmasking must be above 0 and at most 1, not 0.0"),
        (lambda: Unmasking(top_k=0), r"top_k of Unmasking must be from 1"),
        (lambda: Unmasking(temperature=0.0), r"temperature of Unmasking: 0 draws the likeliest token"),
        (lambda: UnmaskedSteps(0), r"steps of UnmaskedSteps must be from 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
