"""What runs on the stand-in, and on the CPU to compare: whole runs, a run of each process and family, planted mistakes.

As a script this is the process with the stand-in: it reads a JSON request a line, [job, arguments, settings], and
answers each.
"""

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from tests.stand_in import device  # before torch

import torch
from PIL import Image
from torch import Tensor

from flashgrpo.distributed.world import single_process
from flashgrpo.learning.experience import Drawn, compare
from flashgrpo.learning.objective import Clipped
from flashgrpo.learning.optim import Optimizer
from flashgrpo.learning.settings import Credit, OptimConfig
from flashgrpo.learning.update import policy_update
from flashgrpo.models.load import load_model
from flashgrpo.models.load_tokens import load_token_model
from flashgrpo.models.lora import trained_parameters, weights_replaced
from flashgrpo.models.settings import ModelConfig
from flashgrpo.presets import FLASH_GRPO, FLOW_GRPO
from flashgrpo.process import Process
from flashgrpo.processes.flow.process import FlowProcess
from flashgrpo.processes.flow.settings import RolloutConfig, SamplingConfig
from flashgrpo.processes.flow.solvers import Euler, UniPC
from flashgrpo.processes.tokens.masked.process import MaskedProcess
from flashgrpo.processes.tokens.masked.settings import MaskedRollout, MaskedSampling, UnmaskedSteps, Unmasking
from flashgrpo.processes.tokens.uniform.model import UniformModel
from flashgrpo.processes.tokens.uniform.process import UniformTokensProcess
from flashgrpo.processes.tokens.uniform.settings import TokensAtTimes, UniformRollout, UniformSampling, UniformTokens
from flashgrpo.scoring.scoring import decode
from flashgrpo.train import train
from flashgrpo.types import Prompt, PromptGroup, RewardTable, Sample
from tests import ursa
from tests.conftest import small_run
from tests.families import KINDS
from tests.models import test_amused as amused
from tests.models import test_llada as llada
from tests.processes.test_conformance import CASES, GUARD, tiny

Numbers = dict[str, float]


def go_round(process: Process, prompts: list[Prompt], objective: Any, count: Any = lambda phase: None) -> Numbers:
    """Draw, score, compare, learn with a moving average, evaluate and take copies: all that a run does with a process.

    Args:
        count: told the name of each phase that has ended.
    """
    world = single_process()
    samples = [Sample(PromptGroup(0, g, prompt, 2), m) for g, prompt in enumerate(prompts) for m in range(2)]
    optim = OptimConfig.model_validate(
        {"lr": 1e-2, "micro_batch": process.micro_batch, "ema": {"decay": 0.5, "every": 1}}
    )
    optimizer = Optimizer(trained_parameters(process.network), optim, world)
    count("begin")
    outputs, record = process.draw(samples, 0, lambda rows, drawn: None)
    count("draw")
    assert outputs.device == process.device == world.device
    videos = decode(process.media, outputs, 2)
    if isinstance(videos, list):  # of texts, as many numbers as samples
        videos = torch.tensor([float(len(text)) for text in videos]).view(-1, 1, 1, 1, 1)
    count("decode")
    rewards = RewardTable(("mean",), videos.mean(dim=(1, 2, 3, 4)).double()[:, None], torch.ones(1).double())
    compared = compare(Drawn(0, 0, outputs, record, rewards), process.channels, Credit(std="group"), world)
    count("compare")
    metrics = policy_update(process, objective, optimizer, compared.record, optim, world)
    count("update")
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in optimizer.state()["ema"].items()}
    with weights_replaced(process.network, copies):  # from the CPU, as `sample` does
        sampled = process.sample(prompts, [(1, row) for row in range(len(prompts))], lambda rows, drawn: None)
    kept = {name: value for name, value in metrics.items() if isinstance(value, float)}
    return {"drawn": _size(outputs), "video": _size(videos), "sampled": _size(sampled), **kept}


def _size(tensor: Tensor) -> float:
    return float(tensor.double().abs().mean())


def process(name: str) -> Numbers:
    """Go round with a process of the conformance suite."""
    case = CASES[name]
    prompts = [Prompt("a red circle moving left slowly", {}), Prompt("a blue square moving up quickly", {})]
    return go_round(case.make(2), prompts, case.objective)


def family(name: str, folder: str, **settings: Any) -> Numbers:
    """Go round with a family's checkpoint, with a penalty, UniPC and guidance; the adapters are written out, too."""
    kind, place = KINDS[name], Path(folder)
    if not (place / "model").exists():
        kind.build().save_pretrained(place / "model")
        Image.new("RGB", (90, 70), "darkgreen").save(place / "first.png")
    columns = {"image": str(place / "first.png")} if kind.takes_image else {}
    columns |= {"last_image": str(place / "first.png")} if kind.last_image else {}
    prompts = [Prompt(text, columns) for text in ("a red circle moving left", "a blue square moving up quickly")]
    config = kind.config(place / "model", condition_cache=tempfile.mkdtemp(), **settings)
    model = load_model(config, single_process(), 0, prompts)
    walk = {"num_steps": 5, "guidance_scale": 4.0, "solver": UniPC(), **kind.guidance}
    rollout, sampling = RolloutConfig.model_validate(walk), SamplingConfig.model_validate({"num_steps": 3})
    algorithm = replace(FLOW_GRPO, objective=replace(FLOW_GRPO.objective, kl_coef=0.1))
    flow = FlowProcess(model, algorithm.explore, algorithm.score, rollout, sampling, 2, single_process())
    numbers = go_round(flow, prompts, algorithm.objective)
    flow.save_lora(Path(tempfile.mkdtemp()), trained_parameters(flow.network))
    return numbers


def token_model(name: str, folder: str) -> Numbers:
    """Go round with a tiny model that fills masks, by its checkpoint, with guidance and a penalty."""
    place = Path(folder) / name
    if not place.exists():
        {"llada": lambda: llada.write(place, llada.Plain()), "amused": lambda: amused.write(place)}[name]()
    size = {"length": 4} if name == "llada" else {"height": 8, "width": 8, "num_frames": 1}
    train_lora = llada.LORA if name == "llada" else amused.LORA
    kept = {"max_sequence_length": 12, "condition_cache": tempfile.mkdtemp()}
    config = ModelConfig.model_validate({"path": str(place), "train": train_lora, **size, **kept})
    prompts = [Prompt(text, {}) for text in ("sum of a b", "of c")]
    model = load_token_model(config, single_process(), 0, prompts)
    rollout = MaskedRollout(num_steps=2, guidance_scale=2.0, micro_batch=2)
    explore, score = Unmasking(top_k=8, top_p=0.9), UnmaskedSteps(2, chance="entropy")
    made = MaskedProcess(model, explore, score, rollout, MaskedSampling(), 2, single_process())
    numbers = go_round(made, prompts, Clipped(clip_range=0.2, kl_coef=0.1))
    made.save_lora(Path(tempfile.mkdtemp()), trained_parameters(made.network))
    return numbers


def uniform_model(folder: str) -> Numbers:
    """Go round with a tiny URSA, by its checkpoint, with a penalty; images are decoded, adapters written."""
    place = Path(folder) / "ursa"
    if not place.exists():
        ursa.write_checkpoint(place)
    lora = {"kind": "lora", "rank": 2, "targets": ["q_proj", "down_proj"]}
    config = ModelConfig.model_validate({**ursa.config(place).model_dump(), "train": lora})
    prompts = [Prompt(text, {}) for text in ("two red", "red cells")]
    model = load_token_model(config, single_process(), 0, prompts)
    assert isinstance(model, UniformModel)
    rollout, score = UniformRollout(num_steps=3, micro_batch=2), TokensAtTimes(times=2, starts=2)
    how = UniformTokens(), score, rollout, UniformSampling(num_steps=3)
    made = UniformTokensProcess(model, *how, 2, single_process())
    numbers = go_round(made, prompts, Clipped(clip_range=0.2, kl_coef=0.1))
    made.save_lora(Path(tempfile.mkdtemp()), trained_parameters(made.network))
    return numbers


def whole_run(folder: str, *overrides: str) -> list[dict[str, Any]]:
    """Train, evaluate and save as the command does; the lines of metrics.jsonl."""
    run = train(small_run(Path(folder) / "run", "updates=1", *overrides))
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def phases(num_steps: int, walks: int, calls: int, unipc: bool = False, guard: bool = False) -> dict[str, int]:
    """Go round with the bundled model, and count the waits of each phase.

    Args:
        walks, calls: micro-batches of the rollout, and of the update, among 4 samples.
        guard: normalized ratios.
    """
    config, model, _ = tiny()
    walk = {"num_steps": num_steps, "micro_batch": 4 // walks, "guidance_scale": 2.0, "retain": False}
    rollout = RolloutConfig.model_validate({**walk, "solver": UniPC() if unipc else Euler()})
    explore, score = FLASH_GRPO.explore, GUARD if guard else FLASH_GRPO.score
    flow = FlowProcess(model, explore, score, rollout, config.evaluation, 4 // calls, single_process())
    counted: dict[str, int] = {}

    def count(phase: str) -> None:
        counted[phase] = sum(device.waits.values())
        device.waits.clear()

    prompts = [Prompt("a red circle moving left slowly", {}), Prompt("a blue square moving up quickly", {})]
    go_round(flow, prompts, FLASH_GRPO.objective, count)
    return counted


def planted(mistake: str) -> dict[str, int]:
    """Go round with a process that makes a mistake; returns what `phases` does."""
    real = FlowProcess.replay

    def replay(self: FlowProcess, record: Any, columns: Any) -> Any:
        for score, numbers in real(self, record, columns):
            if mistake == "mixed":
                score = score + torch.zeros(len(score))
            if mistake == "wait" and score.sum().item() > 1e9:
                raise AssertionError
            yield score, numbers

    FlowProcess.replay = replay  # type: ignore[method-assign]
    try:
        return phases(4, 1, 2)
    finally:
        FlowProcess.replay = real  # type: ignore[method-assign]


RUNS = (process, family, token_model, uniform_model, whole_run, phases, planted)
JOBS: dict[str, Callable[..., Any]] = {job.__name__: job for job in RUNS}


def answer(request: str) -> Any:
    """Do what is asked for; returns the result, the waits by place, and what went wrong."""
    name, arguments, settings = json.loads(request)
    device.waits.clear()
    try:
        with device.Device():
            result, error = JOBS[name](*arguments, **settings), ""
    except Exception:
        result, error = None, traceback.format_exc()
    waits = {f"{kind} {place}": count for (kind, place), count in device.waits.items()}
    return {"result": result, "error": error, "waits": waits}


if __name__ == "__main__":
    with open(int(os.environ["STAND_IN_ANSWERS"]), "w") as answers:  # libraries write to standard output
        for line in sys.stdin:
            print(json.dumps(answer(line)), file=answers, flush=True)
