"""Programs: golden numbers of what is compared, phases, failures, and what a program may not do."""

import json
import math
import threading
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch

from flashgrpo.distributed.world import single_process
from flashgrpo.errors import UserError
from flashgrpo.learning.advantage import advantages_by_key
from flashgrpo.learning.settings import Credit
from flashgrpo.models.lora import trained_parameters
from flashgrpo.process import Record
from flashgrpo.processes.programs.examples import plan_and_draw, slate_and_rank
from flashgrpo.processes.programs.outputs import LONGEST
from flashgrpo.processes.programs.phases import begins_of, checked, phase_of_tokens
from flashgrpo.processes.programs.process import ProgramProcess, state_of
from flashgrpo.processes.programs.recording import Calls, Made, key_of, record_of
from flashgrpo.processes.programs.runs import Answer, Question, Run
from flashgrpo.processes.programs.settings import CallTokens, ProgramRollout, ProgramRuns, ProgramSampling
from flashgrpo.processes.programs.slots import places_for
from flashgrpo.processes.programs.writing import Written
from flashgrpo.rewards.plans import opposite, strokes
from flashgrpo.rewards.slates import ndcg, phases
from flashgrpo.types import Failed, Prompt, PromptGroup, RewardTable, Sample
from tests.programs import plan_and_draw as numbers
from tests.programs import tiny_language_model

WORLD = single_process()
RAW = Credit(std="none", combine="raw", clip=1e6)


def written(*ids: int) -> Written:
    return Written(ids, (-1.0,) * len(ids), None)


def recorded(runs, score=CallTokens(), tags=(), groups=None) -> Record:  # noqa: B008
    """Runs of one group, each a list of (module, token ids)."""
    made = []
    for sample, run in enumerate(runs):
        seen: list[str] = []
        for module, ids in run:
            made.append(Made(sample, module, seen.count(module), 16, [1, 2], written(*ids)))
            seen.append(module)
    calls = Calls(made, max(1, len(tags)), partial(begins_of, tags=tags), score)
    return record_of(calls, groups or [0] * len(runs), tiny_language_model(), WORLD)


def advantages(record: Record, values, channels=("reward",)) -> torch.Tensor:
    values = torch.tensor(values, dtype=torch.float64).view(-1, len(channels))
    table = RewardTable(channels, values, torch.ones(len(channels), dtype=torch.float64), channels=channels)
    pairs, of_term = torch.stack([record.key, record.channel, record.sample]).unique(dim=1, return_inverse=True)
    return advantages_by_key(table, channels, RAW, *pairs)[0][of_term]


def test_golden_calls_are_compared_by_module_and_number():
    """docs/papers.md, mmGRPO: three runs of one plan and one to three drawings, with rewards .2, .5 and .8."""
    runs = [[("plan", [5])] + [("draw", [6])] * count for count in (2, 1, 3)]
    record = recorded(runs)
    given = advantages(record, [0.2, 0.5, 0.8])
    expected = [-0.3, -0.3, -0.3, 0.0, 0.0, 0.3, 0.3, 0.3, 0.0]  # plan, draw 0, draw 1, ... of each run
    torch.testing.assert_close(given, torch.tensor(expected))


def test_golden_phases_are_compared_by_their_own_reward():
    """docs/papers.md, F-GRPO: slate and rank of four completions."""
    slate, rank = (0.5, 1.0, 0.0, 0.5), (0.6934, 1.0, 0.0, 0.3)
    runs = [[("recommend", [1, 2, 3, 4])]] * 4
    record = recorded(runs, CallTokens("phase"), ["1", "2"])
    given = advantages(record, list(zip(slate, rank, strict=True)), ("slate", "rank"))
    torch.testing.assert_close(given[record.channel == 0], torch.tensor([0.0, 0.5, -0.5, 0.0]))
    expected = torch.tensor([0.19505, 0.50165, -0.49835, -0.19835])
    torch.testing.assert_close(given[record.channel == 1], expected, rtol=0, atol=1e-6)


def test_a_reward_of_one_phase_moves_no_advantage_of_another():
    record = recorded([[("recommend", [1, 2, 3, 4])]] * 3, CallTokens(), ["1", "2"])
    one = advantages(record, [(0, 0), (1, 0.5), (0.3, 1)], ("slate", "rank"))
    other = advantages(record, [(0, 7), (1, -2), (0.3, 4)], ("slate", "rank"))
    assert torch.equal(one[record.channel == 0], other[record.channel == 0])
    assert not torch.equal(one[record.channel == 1], other[record.channel == 1])


def test_a_run_that_is_there_twice_changes_only_the_mean():
    runs = [[("plan", [5]), ("draw", [6])], [("plan", [7])], [("plan", [5]), ("draw", [6])]]
    given = advantages(recorded(runs), [0.2, 0.8, 0.2])
    torch.testing.assert_close(given, torch.tensor([-0.2, 0.0, 0.4, -0.2, 0.0]))


def test_golden_ndcg():
    assert ndcg(["b", "a", "x"], {"a", "b"}) == pytest.approx(1.0)
    assert ndcg(["b", "x", "a"], {"a", "b"}) == pytest.approx(0.919721, abs=1e-6)
    assert ndcg(["x", "a", "b"], {"a", "b"}) == pytest.approx(0.693426, abs=1e-6)
    assert ndcg(["a", "a", "a"], {"a", "b"}) == pytest.approx(1 / (1 + 1 / math.log2(3)))


def test_rewards_of_slates():
    found = phases(["<slate> plum owl fig saw <rank> plum owl pear"], ["fruit : plum owl fig saw pear"])
    assert found["slate"] == [pytest.approx(2 / 3)]
    assert found["rank"] == [pytest.approx(1 / sum(1 / math.log2(n + 2) for n in range(3)))]  # pear is not in the slate
    noisy = phases(["<slate> plum"] * 2, ["fruit : plum"] * 2, noise=1.0)["rank"]
    assert noisy[0] == noisy[1] != 0
    with pytest.raises(ValueError, match="is no kind and list"):
        phases([""], ["plum"])


def test_rewards_of_strokes():
    assert (opposite("red"), opposite("cyan")) == ("cyan", "red")
    assert strokes(["cyan red", "cyan", ""], ["beside red boat"] * 3) == pytest.approx([0.4, 0.95, 0.0])
    with pytest.raises(ValueError, match="names none of red"):
        strokes(["cyan"], ["beside a boat"])


def test_where_phases_begin():
    text = "<SLATE> a b <RANK> b"
    assert begins_of(text, ["<SLATE>", "<RANK>"]) == [0, 18]
    ends = [7, 9, 11, 18, 20]
    assert phase_of_tokens(ends, [0, 18]) == [0, 0, 0, 0, 1]
    assert begins_of(text[:11], ["<SLATE>", "<RANK>"]) == [0]  # a tag that does not come
    assert phase_of_tokens(ends[:3], [0]) == [0, 0, 0]


def by_the_first_two(text):
    """Phases of two words, and the rest."""
    words = text.split(" ")
    return [0, len(" ".join(words[:2]))] if len(words) > 2 else [0]


def test_phases_may_be_cut_by_a_function():
    made, _, record = drawn(numbers, phases=["head", "rest"], cut="any:function", how_cut=by_the_first_two)
    state = state_of(record)
    for unit in range(len(record)):
        count = int(state.drawn[unit])
        words = made.model.text(state.ids[unit, -state.length :][:count].tolist()).split()
        assert state.phase[unit, :count].tolist() == ([0, 0] + [1] * (count - 2) if len(words) > 2 else [0] * count)
    assert made.channels == ("head", "rest")


@pytest.mark.parametrize("begins", [None, [], [1], [0, 3, 2], [0, 1, 2, 3], [0, 1.5], "0"])
def test_what_a_cut_may_not_say(begins):
    with pytest.raises(UserError, match=r"rollout.cut: a function that cuts a text returns .* each of its 3 phases"):
        checked(lambda text: begins, 3)("a b c d")


def test_weights_of_tokens():
    """Completions of 1 and 3 tokens: the mean over all tokens of w x is what `length` says."""
    runs, x = [[("a", [5])], [("a", [6, 7, 8])]], torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = {
        kind: (recorded(runs, CallTokens(length=kind)).weight * x).mean() for kind in ("tokens", "sequence", "maximum")
    }
    assert found["tokens"] == pytest.approx(2.5)
    assert found["sequence"] == pytest.approx((1 + 3) / 2)
    assert found["maximum"] == pytest.approx((1 / 4 + 9 / 4) / 2)


def test_keys_and_places():
    assert len({key_of(1, m, k, p) for m in ("plan", "draw") for k in range(4) for p in range(2)}) == 16
    assert key_of(999_999, "plan", 3, 1) < 2**43
    assert (places_for(20, 512), places_for(20, 24), places_for(1, 8), places_for(16, 64)) == (32, 24, 8, 16)


# ---- runs ------------------------------------------------------------------------------------------------------------


def process(program, phases=None, how_cut=None, **settings) -> ProgramProcess:
    how = ProgramRollout(prompts=1, group_size=4, micro_batch=4, phases=phases or {}, **settings), ProgramSampling()
    return ProgramProcess(tiny_language_model(), program, ProgramRuns(), CallTokens(), *how, 4, WORLD, cut=how_cut)


def drawn(program, columns=(), **settings):
    made = process(program, **settings)
    samples = [Sample(PromptGroup(0, 0, Prompt("a red", {"color": "red"}), 4), m) for m in range(4)]
    outputs, record = made.draw(samples, 0, lambda rows, outputs: None, 2, columns)
    return made, made.media(outputs), record


def test_a_run_waits_at_its_calls():
    def two(prompt, call, color):
        return call("a", prompt) + call("b", color)

    run = Run(two, "x", {"color": "red"}, nullcontext, 9, 5.0)
    assert run.resume() == Question("a", 0, "x")
    assert run.resume("1") == Question("b", 0, "red")
    assert run.resume("2") == Answer("12")


def test_a_failed_parse_gets_the_failure_reward_and_its_call_is_a_unit():
    def fails(prompt, call, **columns):
        return str(int(call("plan", prompt)) and 1)

    _, texts, record = drawn(fails)
    failed = [isinstance(text, Failed) for text in texts]
    assert any(failed)
    assert all(text.reward == -1.0 for text in texts if isinstance(text, Failed))
    assert record.sample.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("swallows", [False, True])
def test_a_thousand_calls_are_a_failure(swallows):
    def many(prompt, call, **columns):
        for _ in range(1_000):
            try:
                call("again", prompt)
            except Exception:
                assert swallows
        return "done"

    _, texts, record = drawn(many, max_calls=3, failure_reward=-2.0)
    assert [text.reward for text in texts] == [-2.0] * 4
    assert len(record) == 12


def test_long_inputs_and_outputs_are_failures():
    _, texts, record = drawn(lambda prompt, call, **_: call("a", prompt) and call("a", "red " * 50))
    assert all(isinstance(text, Failed) for text in texts)
    assert len(record) == 4
    _, texts, _ = drawn(lambda prompt, call, **_: call("a", prompt) + "x" * LONGEST)
    assert all(isinstance(text, Failed) for text in texts)


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        (lambda prompt, call, **_: None, "returns a text, and this one returned NoneType"),
        (lambda prompt, call, **_: "red", "no run of the update has called the model"),
        (lambda prompt, call, **_: threading.Event().wait(9), "neither called nor returned for 0.2 s"),
    ],
)
def test_what_a_program_may_not_do(program, sentence):
    with pytest.raises(UserError, match=sentence):
        drawn(program, patience=0.2)


def test_what_a_program_raises_passes():
    def broken(prompt, call, **columns):
        return undefined

    with pytest.raises(NameError):
        drawn(broken)
    with pytest.raises(TypeError, match="takes the name of a module and a text"):
        drawn(lambda prompt, call, **_: call("plan", 3))


def test_nothing_runs_on_when_a_program_is_broken():
    def some_wait(prompt, call, **columns):
        call("a", prompt)
        return None

    with pytest.raises(UserError):
        drawn(some_wait)
    left = [thread for thread in threading.enumerate() if thread.name == "program"]
    for thread in left:
        thread.join(10)
    assert not [thread for thread in left if thread.is_alive()]


def test_a_tokenizer_without_the_tags_is_refused():
    with pytest.raises(ValueError, match="tokenizer cannot write '<rank>'"):
        process(numbers, {"slate": "<slate>", "rank": "<rank>"})


def test_examples_fail_as_parsers_do():
    answers = iter(["red two"])
    with pytest.raises(ValueError, match="invalid literal"):
        plan_and_draw("beside red boat", lambda module, text: next(answers))
    with pytest.raises(ValueError, match="a completion is"):
        slate_and_rank("fruit : plum", lambda module, text: "<slate> plum")


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_the_decoder_agrees_up_to_rounding():
    made, _, record = drawn(numbers)
    failures, decoder = made.checks(record, torch.empty(0, 9 + LONGEST, dtype=torch.uint8), 0, False)
    assert decoder.numbers["mismatch"] < 1e-5
    assert "0 of 0 runs" in failures.sentence


@pytest.mark.parametrize("term", ["token", "phase"])
def test_exact_divergences_beside_the_scores(term):
    made = process(numbers, phases={"one": "1", "two": "2"})
    made.score = CallTokens(term, "sequence")
    samples = [Sample(PromptGroup(0, 0, Prompt("a red", {}), 4), m) for m in range(4)]
    _, record = made.draw(samples, 0, lambda rows, outputs: None, 2, ("kl_old",))
    asked = [
        part
        for slot in record.slot.unique()
        for part in made.micro_batches(record[(record.slot == slot).nonzero().flatten()])
    ]
    for part in asked:
        ((_, columns),) = made.replay(part, ("kl", "kl_old"))
        assert (columns["kl_old"] == 0).all()
        assert (columns["kl"] == 0).all()
    for parameter in trained_parameters(made.network).values():
        parameter.data += 0.1
    for part in asked:
        ((score, columns),) = made.replay(part, ("kl", "kl_old"))
        assert columns["kl_old"].shape == score.shape
        torch.testing.assert_close(columns["kl"], columns["kl_old"])
        assert (columns["kl"] > 0).any()


@pytest.mark.parametrize("length", ["tokens", "sequence", "maximum"])
def test_a_phase_is_the_sum_of_its_tokens(length):
    made, _, record = drawn(numbers, phases={"one": "1", "two": "2"})
    by_token = made.old_scores(record)[0]
    made.score = CallTokens("phase", length)
    again = record_of(Calls(_calls_of(record), 2, made.cut, made.score), [0] * 4, made.model, WORLD)
    whole = made.old_scores(again)[0]
    for term in range(len(whole)):
        own = (record.unit == again.unit[term]) & (record.channel == again.channel[term])
        count = {"tokens": 1, "sequence": int(own.sum()), "maximum": made.model.length}[length]
        assert float(whole[term]) == pytest.approx(float(by_token[own].sum()) / count, abs=1e-5)


def _calls_of(record: Record) -> list[Made]:
    state = state_of(record)
    made = []
    for unit in range(len(record)):
        width = state.ids.shape[1] - state.length
        prompt = state.ids[unit, width - int(state.count[unit]) : width].tolist()
        ids = state.ids[unit, width : width + int(state.drawn[unit])].tolist()
        made.append(
            Made(int(record.sample[record.unit == unit][0]), "any", unit, int(record.slot[unit]), prompt, written(*ids))
        )
    return made


def learned(made: ProgramProcess, record: Record, given: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the weights' gradients of the sum of scores times `given`, and whether each token's logits have one."""
    found, real, weights = [], made.model.logits, [*trained_parameters(made.network).values()]

    def watched(ids, count):
        found.append(real(ids, count))
        found[-1].retain_grad()
        return found[-1]

    made.model.logits = watched
    given_to = replace(record, advantage=given)
    for slot in record.slot.unique():
        for part in made.micro_batches(given_to[(record.slot == slot).nonzero().flatten()]):
            ((score, _),) = made.replay(part, ())
            (score * part.advantage).sum().backward()
    made.model.logits = real
    gradients = [weight.grad.clone() for weight in weights]
    for weight in weights:
        weight.grad = None
    return gradients, torch.cat([logits.grad.ne(0).any(-1).flatten() for logits in found])


def two_calls(prompt, call, **columns):
    return json.dumps([call("plan", prompt), call("draw", prompt)])


@pytest.mark.parametrize("program", [numbers, two_calls])
def test_no_gradient_crosses_phases_or_keys(program):
    """The scores of one phase, and of one module and call, have gradients in the logits of their own tokens alone."""
    made, _, record = drawn(program, phases={"one": "1", "two": "2"})
    of_term = torch.stack([record.key, record.channel])
    groups = [(of_term == one[:, None]).all(0) for one in of_term.unique(dim=1).T]
    reached = [learned(made, record, own.float())[1] for own in groups]
    assert len(groups) > 2
    assert torch.stack(reached).sum(0).max() == 1
    assert [int(tokens.sum()) for tokens in reached] == [int(own.sum()) for own in groups]


def test_gradients_of_modules_add_up_to_that_of_the_trajectory():
    """Where all runs have one shape and nothing is divided by a std."""
    made, _, record = drawn(two_calls)
    given = torch.tensor([0.1, 0.9, -0.3, 0.4])
    by_module = advantages(record, given.tolist())
    trajectory = (given - given.mean())[record.sample]
    torch.testing.assert_close(by_module, trajectory)
    plan, draw = (learned(made, record, by_module * (record.key == key))[0] for key in record.key.unique())
    for of_plan, of_draw, whole in zip(plan, draw, learned(made, record, trajectory)[0], strict=True):
        torch.testing.assert_close(of_plan + of_draw, whole)


def test_a_stroke_of_two_words_has_failed():
    answers = iter(["red 1", "red red"])
    with pytest.raises(ValueError, match="a stroke is one word"):
        plan_and_draw("beside red boat", lambda module, text: next(answers))
