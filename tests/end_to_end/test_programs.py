"""Programs, trained as any model is: a run of a tiny random one from recipe to report, and what recipes may not say."""

import json
from pathlib import Path

import pytest
import torch
from markupsafe import escape

from flashgrpo.config import RunConfig
from flashgrpo.doctor.estimate import GRADIENTS, MOMENTS, estimate
from flashgrpo.errors import UserError
from flashgrpo.evaluate import evaluate
from flashgrpo.export import export
from flashgrpo.kinds import kind_of
from flashgrpo.report import write_report
from flashgrpo.run import checkpoint
from flashgrpo.run.lines import read_lines
from flashgrpo.train import train
from tests.programs import write_language_model

REWARD = """
def both(texts, prompts, more="second", **columns):
    return {"first": [float(len(t)) for t in texts], more: [float(t.count("1")) for t in texts]}
"""


@pytest.fixture
def recipe(tmp_path):
    """Settings of a very small run, with overrides."""
    (tmp_path / "reward.py").write_text(REWARD, "utf-8")
    for part, text in (("train", "a red"), ("heldout", "a blue")):
        lines = [json.dumps({"prompt": f"{text} {n}"}) for n in range(1, 5)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines), "utf-8")
    folder = write_language_model(tmp_path / "model")

    def make(*overrides: str) -> RunConfig:
        small = [
            f"out={tmp_path}/run",
            "updates=4",
            f"model.path={folder}",
            "model.length=4",
            "model.max_sequence_length=20",
            "rollout={prompts: 2, group_size: 4, program: 'tests.programs:plan_and_draw', phases: {a: '1', b: '2'}}",
            f"rewards={{strokes: null, both: {{call: '{tmp_path}/reward.py:both', channel: {{first: a, second: b}}}}}}",
            f"prompts={{train: {tmp_path}/train.jsonl, heldout: {tmp_path}/heldout.jsonl}}",
            "optim={micro_batch: 4, ema: {decay: 0.5, every: 1}}",
            "evaluation={every: 2, videos: 1}",
            "checkpoint.every=1",
            "tracking.progress=false",
        ]
        return RunConfig.load("tiny-program", [*small, *overrides])

    return make


def test_a_run_from_recipe_to_export(recipe, tmp_path):
    run = train(recipe("algorithm={preset: f-grpo, objective: {kind: kl-masked}}", "optim.minibatches=2"))
    lines = read_lines(run / "metrics.jsonl")
    assert all(line["drift"] == 0 and line["grad_norm"] > 0 for line in lines)
    assert {*lines[0]["rewards"]} == {"both.first", "both.second"}
    assert write_report(run).is_file()
    assert [file.suffix for file in (run / "videos/000000").iterdir()] == [".txt"]
    export(run, out=tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_what_a_prompt_writer_wrote_is_on_its_page(recipe):
    """Beside both videos, which are of the same noise; what a writer has to beat is a program that never calls."""
    environment = "rollout={environment: tiny, environment_steps: 1}"
    small = "rewards={both: null, small: {call: 'flashgrpo.rewards.jpeg:compressibility', channel: a}}"
    few = ["updates=1", "rollout.group_size=2", "evaluation={every: 1, samples_per_prompt: 1}", "optim.lr=1.0"]
    run = train(recipe(environment, small, *few))
    base, tuned = read_lines(run / "evaluations.jsonl")
    captions = [(sample["base_caption"], sample["caption"]) for sample in tuned["samples"]]
    assert [before for before, _ in captions] == [sample["caption"] for sample in base["samples"]]
    assert all(caption.startswith('["') for pair in captions for caption in pair)
    page = write_report(run).read_text("utf-8")
    for model, text in zip(("base", "tuned"), captions[0], strict=True):
        assert f'{model} wrote: <strong class="prompt" title="{escape(text)}">' in page
    fixed = evaluate(run / "config.yaml", ["rollout.program=flashgrpo.processes.programs.examples:wish_itself"])
    assert [sample["caption"] for sample in fixed["samples"]] == [sample["prompt"] for sample in base["samples"]]


def test_resumed_is_uninterrupted_bit_for_bit(recipe, tmp_path):
    whole = train(recipe(f"out={tmp_path}/whole"))
    parts = train(recipe(f"out={tmp_path}/parts", "updates=2"))
    assert train(recipe(f"out={tmp_path}/parts")) == parts
    one, other = (checkpoint.load(run / "checkpoints", 4) for run in (whole, parts))
    for kind, tensors in one.items():
        assert all(torch.equal(tensor, other[kind][name]) for name, tensor in tensors.items())


def test_killed_at_any_write_it_ends_with_the_same_weights(recipe, tmp_path, nursery):
    """With adapters of modules, some of them of an average that draws."""
    own = "rollout.adapters={plan: planner}", "algorithm.behaviour={kind: averaged}", "algorithm.kl_coef=0.1"
    whole, killed = (recipe("updates=2", f"out={tmp_path}/{name}", *own) for name in ("whole", "killed"))
    (file := tmp_path / "killed.yaml").write_text(killed.to_yaml(), "utf-8")
    for write_number in (15, 35):
        assert nursery.start("train_and_die", file, write_number).wait() != [0]
    run = Path(nursery.run("train", file))
    one, other = (checkpoint.load(each / "checkpoints", 2) for each in (train(whole), run))
    assert all(torch.equal(tensor, other[kind][name]) for kind in one for name, tensor in one[kind].items())


def test_a_run_with_adapters_of_modules(recipe, tmp_path):
    """Every set learns, the export has each of them, and its card says how they are loaded."""
    own = "rollout.adapters={plan: planner, draw: painter}", "rollout.other_modules=refuse"
    run = train(recipe(*own, "updates=2"))
    assert all(line["drift"] == 0 and line["grad_norm"] > 0 for line in read_lines(run / "metrics.jsonl"))
    policy = checkpoint.load(run / "checkpoints", 2)["policy"]
    learnt = {name: tensor for name, tensor in policy.items() if ".lora_B." in name}
    assert len(learnt) == 2 * len([name for name in learnt if name.endswith(".planner.weight")])
    assert all(tensor.any() for tensor in learnt.values())
    export(run, out=tmp_path / "out")
    for name in ("planner", "painter"):
        assert (tmp_path / "out" / name / "adapter_model.safetensors").is_file()
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert 'PeftModel.from_pretrained(network, "planner", adapter_name="planner")' in card
    assert 'network.load_adapter("painter", adapter_name="painter")' in card
    assert "- Adapters: planner, painter" in card
    with pytest.raises(UserError, match="adapters planner, painter cannot be in one set of weights"):
        export(run, "merged", tmp_path / "merged")
    with pytest.raises(UserError, match=r"another rollout.adapters.draw \(painter, now planner\)"):
        train(recipe(*own, "rollout.adapters.draw=planner"))


@pytest.mark.parametrize("parallel", ["{}", "{shard: 2}"])
def test_two_processes_train_the_same_adapters_as_one(recipe, tmp_path, nursery, parallel):
    """Processes that hold the network between them differentiate the same adapters at a time, equally often."""
    one, two, file = f"{tmp_path}/one", f"{tmp_path}/two", tmp_path / "recipe.yaml"
    own = "rollout.adapters={plan: planner}", "optim.minibatches=2", "optim.micro_batch=2", "algorithm.kl_coef=0.1"
    file.write_text(recipe("updates=2", f"out={one}", "checkpoint.every=2", *own).to_yaml(), "utf-8")
    train(RunConfig.load(file))
    nursery.run("train", file, f"out={two}", f"parallel={parallel}", size=2)
    assert all(line["drift"] == 0 for line in read_lines(Path(two) / "metrics.jsonl"))
    weights, others = (checkpoint.load(Path(run) / "checkpoints", 2)["policy"] for run in (one, two))
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("parallel", ["{}", "{shard: 2}"])
def test_two_processes_train_what_one_does(recipe, tmp_path, nursery, parallel):
    """Runs of a program call ragged numbers of times; processes that hold the network between them call together."""
    one, two = f"{tmp_path}/one", f"{tmp_path}/two"
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe("updates=2", f"out={one}", "algorithm={preset: f-grpo}").to_yaml(), "utf-8")
    train(RunConfig.load(file))
    nursery.run("train", file, f"out={two}", f"parallel={parallel}", size=2)
    lines, others = (read_lines(Path(run) / "metrics.jsonl") for run in (one, two))
    assert [line["reward"] for line in lines[:1]] == [line["reward"] for line in others[:1]]
    assert all(line["drift"] == 0 for line in others)
    assert lines[0]["compute"] == others[0]["compute"]
    if parallel == "{}":
        assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in others], abs=1e-6)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["algorithm.credit.baseline=anchor"], "programs have no anchor"),
        (["algorithm.objective.kind=competing"], "of programs there are log-probabilities"),
        (["rollout.phases.b="], "a phase begins behind a text that is not empty"),
        (["rollout.phases=[a, b]"], "a list of channels is cut by the function that rollout.cut names"),
        (["rollout.cut=tests.programs:cut"], "give one of both"),
        (["rollout.phases=[a, a]", "rollout.cut=tests.programs:halves"], "each channel stands there once"),
        (
            ["rollout.phases=[a, b]", "rollout.cut=tests.programs:nothing"],
            "rollout.cut: tests.programs has no function",
        ),
        (
            ["rollout.phases=[a, b]", "rollout.cut=tests.programs:broken"],
            r"rollout.cut raised KeyError .* at .*programs.py",
        ),
        (["rollout.environment_steps=4"], "rollout.environment_steps: there is no environment"),
        (["rollout.environment_guidance=4"], "rollout.environment_guidance: there is no environment"),
        (["rollout.phases.b=green"], "tokenizer cannot write 'green'"),
        (["rollout.environment=tiny-sudoku"], "is a recipe of masked-tokens; name one of a flow model"),
        (["rollout.program=tests.programs:nothing"], "rollout.program: tests.programs has no function 'nothing'"),
        (["rollout.program=nothing"], "rollout.program: 'nothing' must have the form"),
        (["rewards.both.args={more: third}"], "'third', which has no channel there; add it"),
        (["rewards.both.channel={first: a, second: c}"], "this model has no channel 'c'"),
        (["rollout.adapters={plan: own}", "model.train={kind: full}"], "rollout.adapters: full training has none"),
        (["rollout.other_modules=refuse"], "rollout.adapters names no module; name those that a program calls"),
        (["rollout.adapters={plan: Own}"], "rollout.adapters.plan: 'Own' can be no name of adapters"),
        (["rollout.adapters={plan: to}"], "adapters cannot be called 'to'"),
    ],
)
def test_what_does_not_go_together_is_refused(recipe, overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        train(recipe(*overrides))


def test_what_a_program_raises_is_told_with_its_place(recipe, tmp_path):
    (tmp_path / "program.py").write_text("def broken(prompt, call, **columns):\n    return undefined\n", "utf-8")
    with pytest.raises(UserError, match=r"rollout.program raised NameError .* at .*program.py:2"):
        train(recipe(f"rollout.program={tmp_path}/program.py:broken"))


FAILS = {
    "tags that never close": """
    text = call("recommend", prompt)
    if not text.rstrip().endswith("</rank>"):
        raise ValueError("the tags do not close")
    return text""",
    "a parser that never can": """
    return str(json.loads("{" + call("plan", prompt)))""",
    "a thousand calls": """
    return " ".join(call("again", prompt) for _ in range(1_000))""",
    "calls that are caught": """
    while True:
        try:
            call("again", prompt)
        except Exception:
            pass""",
}


@pytest.mark.parametrize("lines", FAILS.values(), ids=FAILS)
def test_a_program_that_always_fails_trains_nothing(recipe, tmp_path, lines):
    """Every run has the failure reward, in each channel; both updates are made, and no weight moves."""
    (tmp_path / "program.py").write_text(f"import json\n\ndef always(prompt, call, **columns):{lines}\n", "utf-8")
    how = f"rollout={{program: '{tmp_path}/program.py:always', max_calls: 3, failure_reward: -1.5}}"
    run = train(recipe("algorithm=f-grpo", how, "updates=2", "optim.weight_decay=0"))
    lines = read_lines(run / "metrics.jsonl")
    assert [line["rewards"] for line in lines] == [{"both.first": -1.5, "both.second": -1.5}] * 2
    assert [line["grad_norm"] for line in lines] == [0, 0]
    assert {sample["reward"] for line in read_lines(run / "evaluations.jsonl") for sample in line["samples"]} == {-3.0}
    policy = checkpoint.load(run / "checkpoints", 2)["policy"]
    assert not any(tensor.any() for name, tensor in policy.items() if ".lora_B." in name)


@pytest.mark.parametrize("preset", ["f-grpo", "mmgrpo"])
def test_a_phase_that_never_comes_has_no_terms(recipe, preset):
    """Completions of one token cannot reach the second phase; the reward of the first teaches as ever."""
    answer = "rollout={program: 'flashgrpo.processes.programs.plain:answer', phases: {a: '1', b: '2'}}"
    run = train(recipe(f"algorithm={preset}", answer, "model.length=1", "updates=2", "optim.lr=0.1"))
    lines = read_lines(run / "metrics.jsonl")
    assert [line["drift"] for line in lines] == [0, 0]
    assert all(line["grad_norm"] > 0 and line["rewards"]["both.first"] > 0 for line in lines)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("return prompt", "no run of the update has called the model, so there is nothing to learn"),
        ("return prompt[1_000]", "no run of the update has called the model, so there is nothing to learn"),
        ("call('plan', prompt)", "a program returns a text, and this one returned NoneType for the prompt 'a "),
        ("raise SystemExit(0)", r"rollout.program raised SystemExit 0 at .*program.py:2"),
        ("return call('plan', 3)", r"rollout.program raised TypeError call\(module, text\) takes the name of a module"),
    ],
)
def test_what_ends_a_run_is_one_sentence(recipe, tmp_path, line, sentence):
    (tmp_path / "program.py").write_text(f"def ends(prompt, call, **columns):\n    {line}\n", "utf-8")
    with pytest.raises(UserError, match=sentence):
        train(recipe(f"rollout.program={tmp_path}/program.py:ends", "updates=2"))
    assert not read_lines(tmp_path / "run" / "metrics.jsonl")


def test_adapters_of_modules_are_counted():
    one, three = (
        estimate(RunConfig.load("tiny-program", own))
        for own in ([], ["rollout.adapters={plan: planner, draw: painter}"])
    )
    assert three.parameters["trained"] == 3 * one.parameters["trained"]
    more = three.parameters["network"] - one.parameters["network"]
    assert more == 2 * one.parameters["trained"]
    assert three.totals["update"] - one.totals["update"] >= 4 * more * (1 + MOMENTS + GRADIENTS)


def test_memory_is_counted():
    memory = kind_of(config := RunConfig.load("tiny-program")).memory(config)
    counts = memory.drawing(64), memory.update(64), memory.sampling(64), memory.kept(64)["samples"]
    assert all(100_000 < count < 100_000_000 for count in counts)
