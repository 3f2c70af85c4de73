"""Modules of a program with adapters of their own: what computes a call, what it trains, what is read and written."""

import re
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from flashgrpo.distributed.world import single_process
from flashgrpo.errors import UserError
from flashgrpo.learning.objective import Clipped
from flashgrpo.learning.optim import Optimizer
from flashgrpo.learning.settings import OptimConfig
from flashgrpo.learning.update import policy_update
from flashgrpo.models.lora import trained_parameters, weights_replaced
from flashgrpo.process import Record
from flashgrpo.processes.programs.process import ProgramProcess
from flashgrpo.processes.programs.settings import CallTokens, ProgramRollout, ProgramRuns, ProgramSampling
from flashgrpo.processes.programs.slots import Slots
from flashgrpo.types import Prompt, PromptGroup, Sample
from tests.programs import language_model, plan_and_draw, set_apart, tiny_language_model, write_language_model

WORLD = single_process()
OWN = {"plan": "planner", "draw": "painter"}
SAMPLES = [Sample(PromptGroup(0, 0, Prompt("a red", {}), 4), member) for member in range(4)]


def process(adapters, others="share", program=plan_and_draw, apart=True, **settings) -> ProgramProcess:
    rollout = ProgramRollout(prompts=1, group_size=4, micro_batch=4, adapters=adapters, other_modules=others)
    model = tiny_language_model(adapters=rollout.adapter_names, **settings)
    if apart:
        set_apart(model)
    return ProgramProcess(model, program, ProgramRuns(), CallTokens(), rollout, ProgramSampling(), 4, WORLD)


def drawn(made: ProgramProcess, uses=2) -> tuple[list[str], Record]:
    outputs, record = made.draw(SAMPLES, 0, lambda rows, outputs: None, uses)
    return list(made.media(outputs)), record


def parts_of(made: ProgramProcess, record: Record) -> list[Record]:
    slots = [(record.slot == slot).nonzero().flatten() for slot in record.slot.unique()]
    return [part for units in slots for part in made.micro_batches(record[units])]


def gradient(made: ProgramProcess, parts) -> dict[str, torch.Tensor]:
    """Return the gradients of the sum of scores times advantages; zero where there is none."""
    weights = trained_parameters(made.network)
    for part in parts:
        ((score, _),) = made.replay(part, ())
        (score * part.advantage).sum().backward()
    found = {name: torch.zeros_like(w) if w.grad is None else w.grad.clone() for name, w in weights.items()}
    for weight in weights.values():
        weight.grad = None
    return found


def of(name: str) -> re.Pattern:
    return re.compile(rf"\.{name}\.weight$")


def test_slots_are_of_adapters_and_of_widths():
    slots = Slots(("default", "planner"), {"plan": "planner"}, 40)
    assert [slots.of("draw", 3), slots.of("plan", 3), slots.of("plan", 33)] == [16, 57, 81]
    assert [slots.split(slot) for slot in (16, 57, 81)] == [("default", 16), ("planner", 16), ("planner", 40)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_first_ratio_is_1_and_another_modules_adapters_give_another(checkpointing):
    made = process(OWN, gradient_checkpointing=checkpointing)
    _, record = drawn(made)
    assert {made.slots.split(slot)[0] for slot in record.slot.tolist()} == {"planner", "painter"}
    for part in parts_of(made, record):
        ((score, _),) = made.replay(part, ())
        assert torch.equal(score.detach(), part.old)
    swapped = replace(made.slots, names=("default", "painter", "planner"))
    made.slots = swapped
    first = parts_of(made, record)[0]
    ((score, _),) = made.replay(first, ())
    assert not torch.equal(score.detach(), first.old)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_no_gradient_of_a_modules_calls_reaches_other_adapters(checkpointing):
    """A backward pass is with the adapters of its forward, where blocks are computed again, too."""
    made = process({"plan": "planner"}, gradient_checkpointing=checkpointing)
    _, record = drawn(made)
    given = replace(record, advantage=torch.linspace(-1, 1, len(record.unit)))
    for module in ("planner", "default"):
        own = [part for part in parts_of(made, given) if made.slots.split(int(part.slot[0]))[0] == module]
        for name, values in gradient(made, own).items():
            assert bool(values.any()) == bool(of(module).search(name)), name
    assert len(trained_parameters(made.network)) == 2 * len(trained_parameters(process({}).network))


def test_gradients_of_adapters_add_up_to_that_of_the_trajectory():
    """With equal values in all adapters, the sum over them is the gradient of one set that computes every call."""
    one, two = process({}, apart=False), process(OWN, "refuse", apart=False)
    for model in (one.model, two.model):
        for name, weight in trained_parameters(model.network).items():
            key = re.sub(r"\.(default|planner|painter)\.weight$", "", name)
            weight.data += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(key)))
    (texts, record), (others, other) = drawn(one), drawn(two)
    assert texts == others
    given = [replace(each, advantage=each.sample * 0.5 - 0.7) for each in (record, other)]
    whole, apart = (gradient(made, parts_of(made, each)) for made, each in zip((one, two), given, strict=True))
    for name, values in whole.items():
        own = [apart[of("default").sub(f".{adapter}.weight", name)] for adapter in ("planner", "painter")]
        assert all(part.any() for part in own)
        torch.testing.assert_close(sum(own), values)


@pytest.mark.parametrize("names", [("default", "default"), ("one", "one")])
def test_modules_that_share_one_set_train_as_without_the_setting(names):
    """Bit for bit, whatever the set is called."""
    plain, shared = process({}, apart=False), process(dict(zip(OWN, names, strict=True)), "refuse", apart=False)
    found = []
    for made in (plain, shared):
        optimizer = Optimizer(trained_parameters(made.network), OptimConfig(lr=0.05, micro_batch=4), WORLD)
        for _ in range(2):
            texts, record = drawn(made)
            given = replace(record, advantage=record.sample - 1.5)
            metrics = policy_update(made, Clipped(clip_range=0.2), optimizer, given, optimizer.config, WORLD)
        found.append((texts, metrics, [weight.detach() for weight in optimizer.parameters.values()]))
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(one, other) for one, other in zip(found[0][2], found[1][2], strict=True))


def test_the_reference_is_without_any_adapters_and_averages_are_of_all():
    made = process(OWN, "refuse")
    _, record = drawn(made)
    base = process({}, apart=False)
    trained = trained_parameters(made.network)
    average = {name: torch.zeros_like(weight) for name, weight in trained.items()}
    made.set_average(lambda: weights_replaced(made.network, average))
    for part in parts_of(made, record):
        ((_, columns),) = made.replay(part, ("kl", "kl_average"))
        assert (columns["kl"] > 0).any()
        torch.testing.assert_close(columns["kl"], columns["kl_average"])  # adapters of zeros are the base, too
        with made.reference():
            ((score, _),) = made.replay(part, ())
        base_part = replace(part, slot=part.slot % (made.model.width + 1))
        torch.testing.assert_close(score, base.replay(base_part, ())[0][0].detach())
    assert trained_parameters(made.network).keys() == trained.keys()


def test_a_module_without_adapters_is_one_sentence():
    with pytest.raises(UserError, match=r"rollout.adapters: the program calls module 'draw', which has none; name it"):
        drawn(process({"plan": "planner"}, "refuse"))


def test_the_doctor_tells_of_adapters_that_no_call_has():
    made = process({**OWN, "darw": "slip"})
    outputs, record = made.draw(SAMPLES, 0, lambda rows, outputs: None, 2)
    (told,) = [one for one in made.checks(record, outputs, 0, False) if one.check == "adapters"]
    assert told.numbers == {"unused": ["default", "slip"]}
    assert told.level == "warning"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_each_set_is_written_where_peft_finds_it_and_read_back(tmp_path):
    folder = write_language_model(tmp_path / "model")
    model = language_model(folder, adapters=("default", "planner"))
    set_apart(model)
    tensors = {name: value.detach().clone() for name, value in trained_parameters(model.network).items()}
    files = model.save_lora(tmp_path / "out", tensors)
    assert "adapter_config.json" in files
    assert "planner/adapter_model.safetensors" in files
    ids, count = torch.tensor([[11, 13, 14, 3, 4, 5, 6]]), torch.tensor([3])
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "out")
    plain.load_adapter(tmp_path / "out" / "planner", adapter_name="planner")
    again = language_model(folder, adapters=("planner", "default"), begin=str(tmp_path / "out"))
    found = []
    for name in model.adapters:
        for each in (model, again):
            each.use(name)
        plain.set_adapter(name)
        found.append(model.logits(ids, count))
        torch.testing.assert_close(plain(input_ids=ids).logits[:, 2:-1], found[-1], rtol=1e-4, atol=1e-5)
        assert torch.equal(again.logits(ids, count), found[-1])
    assert not torch.allclose(*found)
    assert again.identity != model.identity
    with pytest.raises(UserError, match="adapters default, planner cannot be in one set of weights"):
        model.save_merged(tmp_path / "merged", tensors)


def test_one_file_is_where_all_sets_begin(tmp_path):
    folder = write_language_model(tmp_path / "model")
    model = language_model(folder)
    set_apart(model)
    tensors = {name: value.detach().clone() for name, value in trained_parameters(model.network).items()}
    model.save_lora(tmp_path / "out", tensors)
    ids, count = torch.tensor([[11, 13, 14, 3, 4, 5, 6]]), torch.tensor([3])
    for merged in (False, True):
        begun = language_model(folder, adapters=("a1", "a2"), begin=str(tmp_path / "out"), merge_adapters=merged)
        for name in begun.adapters:
            begun.use(name)
            torch.testing.assert_close(begun.logits(ids, count), model.logits(ids, count))


@pytest.mark.parametrize("name", ["update", "to", "keys", "training", "a", "lora", "q_proj", "layers", "0"])
def test_names_that_torch_or_peft_take_for_something_else(name):
    with pytest.raises(UserError, match=f"adapters cannot be called '{name}', which is the name of something else"):
        tiny_language_model(adapters=("default", name))


@pytest.mark.parametrize("name", ["weight", "default_0", "1", "lora_a"])
def test_odd_names(name, tmp_path):
    model = tiny_language_model(adapters=("default", name))
    set_apart(model)
    tensors = {key: value.detach().clone() for key, value in trained_parameters(model.network).items()}
    model.save_lora(tmp_path, tensors)
    again = tiny_language_model(adapters=("default", name), begin=str(tmp_path))
    assert all(torch.equal(tensors[key], value) for key, value in trained_parameters(again.network).items())
