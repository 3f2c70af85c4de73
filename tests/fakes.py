"""Processes that fit on a page: what the engine asks of a process, without a pipeline, a video or a GPU.

`Colour` is the smallest there is and the example of docs/adding-a-process.md: one Gaussian action for each sample.
`Program` is ragged: a sample is several calls, a call several tokens, and each call is compared with the same call of
the others. Both make videos of a single colour, so every reward for videos can judge them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flashgrpo.distributed.world import current_device
from flashgrpo.models.lora import weights_replaced
from flashgrpo.process import Cost, PipelineCall, Record
from flashgrpo.processes.calls import fixed_batches
from flashgrpo.seeds import generator, keyed_bits, normal
from flashgrpo.types import REWARD, WHOLE, Condition, index_rows, to_device

WIDTH = 8  # numbers that stand for a text
STD = 0.5  # of a colour around the policy's mean


class Fake:
    """Hold a network, and do what is the same for every small process.

    Args:
        inputs, outputs: numbers in and out of the network, whose rows do not see each other. `inputs` is a multiple of
            4: a product of matrices rounds rows that are not aligned by their place in the batch.
        micro_batch: units replayed at once, and rows of each call of the network.
        prompts, group_size: samples of an update; `cost` counts by them.
    """

    channels: Sequence[str] = (REWARD,)
    views: Sequence[str] = (WHOLE,)
    addends = 1
    identity = "fake"
    takes_image = False
    sample_rate: int | None = None

    def __init__(self, inputs, outputs, micro_batch=4, prompts=2, group_size=4):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Linear(inputs, outputs))
        self.device = current_device()
        self.network.to(self.device)
        self.inputs, self.outputs, self.micro_batch = inputs, outputs, micro_batch
        self.prompts, self.group_size = prompts, group_size
        self.base = {name: weight.detach().clone() for name, weight in self.network.named_parameters()}

    def set_average(self, weights):
        """Have no use for averaged weights."""

    def exploring(self, explore, score):
        return self

    def exact(self, x: Tensor) -> Tensor:
        """Call the network on `micro_batch` rows at a time, whatever there is: equal rows in, equal bits out."""
        batches = fixed_batches(len(x), self.micro_batch)
        parts = [self.network(index_rows(x, rows))[:new] for rows, new in batches]
        return torch.cat([torch.empty(0, self.outputs, device=self.device), *parts])

    def encode(self, prompts):
        rows = [normal((1, WIDTH), prompt.text, "text") for prompt in prompts]
        return Condition({"text": to_device(torch.cat([torch.empty(0, WIDTH), *rows]), self.device)})

    def clips(self, view, prompt, sample):
        raise AssertionError("rewards look at whole samples")

    def token_counts(self, texts):
        return [len(text.split()) for text in texts]

    def micro_batches(self, record):
        rows = torch.arange(len(record))
        return [record[rows[first : first + self.micro_batch]] for first in range(0, len(record), self.micro_batch)]

    def reference(self) -> AbstractContextManager[None]:
        return weights_replaced(self.network, self.base)

    def stage(self, slot):
        return self.network

    def idle(self, slot, columns):
        return [self.exact(torch.zeros(1, self.inputs, device=self.device))]

    def stream(self, prompt, name, num_steps=None):
        yield self.media(self.sample([prompt], [name], lambda rows, outputs: None))[0]

    def sound(self, outputs):
        raise AssertionError

    def media(self, outputs, frames=None):
        """Paint videos (B, F, 3, 16, 16), each in one colour, (B, 3) in [0, 1]."""
        return outputs[:, None, :, None, None].expand(-1, frames or 2, -1, 16, 16).contiguous()

    def captions(self, outputs):
        return []

    def checks(self, record, outputs, seed, thorough):
        return []

    def pipeline_call(self, given):
        return PipelineCall(given)

    def save_lora(self, folder: Path, tensors, style="diffusers"):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "policy.safetensors")
        return ["policy.safetensors"]

    def save_merged(self, folder: Path, tensors):
        self.save_lora(folder, tensors)


@dataclass(frozen=True)
class Painted:
    """Keep what `Colour` needs to score U units again."""

    x: Tensor
    action: Tensor

    def __getitem__(self, units: Tensor) -> "Painted":
        return Painted(index_rows(self.x, units), index_rows(self.action, units))


class Colour(Fake):
    """Draw a colour for a prompt, sigmoid(action) with action ~ N(W text + b, STD^2 I): a unit of one term a sample."""

    def __init__(self, **settings):
        super().__init__(inputs=WIDTH, outputs=3, **settings)

    @torch.no_grad()
    def draw(self, samples, seed, on_drawn, uses=1, columns=()):
        x = self.encode([sample.group.prompt for sample in samples]).tensors["text"]
        mean = self.exact(x)
        action = mean + STD * _noise([(seed, "colour", *sample.name) for sample in samples])
        rows, zero = torch.arange(len(samples)), torch.zeros(len(samples), dtype=torch.int64)
        on_drawn(rows, action.sigmoid())
        group = torch.tensor([sample.group.group for sample in samples], dtype=torch.int64)
        weight, old = torch.ones(len(samples), device=self.device), -_energy(action - mean)
        record = Record(zero, rows, rows, group, zero, weight, old, Painted(x, action))
        return action.sigmoid(), record

    def replay(self, record, columns):
        mean = self.exact(record.state.x)
        score = -_energy(record.state.action - mean)
        if "kl" not in columns:
            return [(score, {})]
        with torch.no_grad(), self.reference():
            base = self.exact(record.state.x)
        return [(score, {"kl": _energy(mean - base)})]

    @torch.no_grad()
    def sample(self, prompts, names, on_drawn, num_steps=None):
        colours = (self.exact(self.encode(prompts).tensors["text"]) + STD * _noise(names)).sigmoid()
        on_drawn(torch.arange(len(prompts)), colours)
        return colours

    def cost(self, seed, update, passes, columns, uses=1):
        samples = self.prompts * self.group_size
        return Cost(samples, samples * passes * (3 + ("kl" in columns)))


class Picture(Colour):
    """The same colours as images."""

    def media(self, outputs, frames=None):
        return super().media(outputs, 1)


class Writer(Colour):
    """The same colours as texts: "red 0.25, green 0.5, blue 0.75"."""

    def media(self, outputs, frames=None):
        names = ("red", "green", "blue")
        rows = outputs.tolist()
        return [", ".join(f"{name} {value:.2f}" for name, value in zip(names, row, strict=True)) for row in rows]


class InTwo(Colour):
    """The same colours, whose score is the sum of two addends: of the first number, and of the other two."""

    addends = 2

    @torch.no_grad()
    def draw(self, samples, seed, on_drawn, uses=1, columns=()):
        outputs, record = super().draw(samples, seed, on_drawn, uses, columns)
        parts = [record[rows] for rows in torch.arange(len(record)).split(self.micro_batch) if len(record)]
        old = torch.cat([torch.empty(0, device=self.device), *(whole_score(self, part) for part in parts)])
        return outputs, replace(record, old=old)

    def replay(self, record, columns):
        for numbers in (slice(0, 1), slice(1, 3)):
            mean, action = (rows[:, numbers] for rows in (self.exact(record.state.x), record.state.action))
            kl = {}
            if "kl" in columns:
                with torch.no_grad(), self.reference():
                    base = self.exact(record.state.x)[:, numbers]
                kl = {"kl": _energy(mean - base)}
            yield -_energy(action - mean), kl

    def idle(self, slot, columns):
        for _ in range(self.addends):
            yield from super().idle(slot, columns)

    def cost(self, seed, update, passes, columns, uses=1):
        """Two forwards a replay, which draws `old`, too; an update replays once without gradient and once with it."""
        samples = self.prompts * self.group_size
        return Cost(3 * samples, 2 * samples * passes * (4 + 2 * ("kl" in columns)))


def whole_score(process, record, columns=()) -> Tensor:
    """Return the scores of a micro-batch as the sum of their addends."""
    return sum(score for score, _ in process.replay(record, columns))


def _noise(names) -> Tensor:
    return to_device(torch.cat([torch.empty(0, 3), *(normal((1, 3), *name) for name in names)]), current_device())


def _energy(distance: Tensor) -> Tensor:
    """Return the sum of squares over 2 STD^2, (T,), column by column: a reduction may round by the number of rows."""
    return sum(distance.square().unbind(1)) / (2 * STD**2)


# ---- ragged: several terms for a unit, several units for a sample, keys below the group, two channels ----------------

CALLS, LENGTH, TOKENS = 3, 3, 5  # calls of a sample and tokens of a call, at most; token 0 stands before each call


@dataclass(frozen=True)
class Calls:
    """Keep what `Program` needs to score U calls again: (L, inputs) and (L,) for each, of different lengths L."""

    inputs: Sequence[Tensor]
    tokens: Sequence[Tensor]

    def __getitem__(self, units: Tensor) -> "Calls":
        return Calls([self.inputs[unit] for unit in units], [self.tokens[unit] for unit in units])


class Program(Fake):
    """Write one to three calls of one to three tokens: a unit is a call, a term a token, a key (group, k-th call).

    First calls are judged by the channel "reward", later ones by "revision". How long a sample and its calls are is
    named by the sample, and not by the policy, since `cost` has to know it before anything is drawn.
    """

    channels = (REWARD, "revision")

    def __init__(self, **settings):
        super().__init__(inputs=WIDTH + CALLS + TOKENS, outputs=TOKENS, **settings)
        self.network.append(nn.LogSoftmax(-1))

    @torch.no_grad()
    def draw(self, samples, seed, on_drawn, uses=1, columns=()):
        text = self.encode([sample.group.prompt for sample in samples]).tensors["text"]
        outputs, units, old = torch.zeros(len(samples), 3, device=self.device), [], []
        for row, sample in enumerate(samples):
            calls = self._write(text[row], (seed, "program", *sample.name))
            outputs[row] = _shares(calls)
            on_drawn(torch.tensor([row]), outputs[row : row + 1])
            units += [(row, sample.group.group, call, *one[:2]) for call, one in enumerate(calls)]
            old += [one[2] for one in calls]
        sample, group, call = torch.tensor([unit[:3] for unit in units], dtype=torch.int64).view(-1, 3).T
        of_term = torch.arange(len(units)).repeat_interleave(torch.tensor([len(one) for one in old], dtype=torch.int64))
        key, channel = (group * CALLS + call)[of_term], (call > 0).long()[of_term]
        state = Calls([unit[3] for unit in units], [unit[4] for unit in units])
        weight, scores = (torch.cat([torch.empty(0), *of]).to(self.device) for of in ([torch.ones(len(of_term))], old))
        return outputs, Record(call, of_term, sample[of_term], key, channel, weight, scores, state)

    def _write(self, text: Tensor, name) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Write the calls of a sample: inputs (L, inputs), tokens (L,) and log-probabilities (L,) of each."""
        calls = []
        for call, length in enumerate(_lengths(name)):
            x, tokens, scores = torch.zeros(length, self.inputs, device=self.device), [0], []
            for place in range(length):
                x[place, :WIDTH] = text
                x[place, WIDTH + call] = x[place, WIDTH + CALLS + tokens[-1]] = 1
                log_p = self.exact(x[place : place + 1])[0].cpu()
                uniform = torch.rand(TOKENS, generator=generator(*name, call, place))
                tokens.append(int((log_p - (-uniform.log()).log()).argmax()))
                scores.append(log_p[tokens[-1]])
            calls.append((x, torch.tensor(tokens[1:]), torch.stack(scores)))
        return calls

    def replay(self, record, columns):
        x = torch.cat(list(record.state.inputs))
        token = to_device(torch.cat(list(record.state.tokens)), self.device)
        log_p = self.exact(x)
        score = log_p.gather(1, token[:, None])[:, 0]
        if "kl" not in columns:
            return [(score, {})]
        with torch.no_grad(), self.reference():
            base = self.exact(x)
        return [(score, {"kl": sum((log_p.exp() * (log_p - base)).unbind(1))})]

    @torch.no_grad()
    def sample(self, prompts, names, on_drawn, num_steps=None):
        text = self.encode(prompts).tensors["text"]
        outputs = torch.zeros(len(prompts), 3, device=self.device)
        for row, name in enumerate(names):
            outputs[row] = _shares(self._write(text[row], name))
        on_drawn(torch.arange(len(prompts)), outputs)
        return outputs

    def cost(self, seed, update, passes, columns, uses=1):
        names = [(seed, "program", update, p, m) for p in range(self.prompts) for m in range(self.group_size)]
        tokens = sum(sum(_lengths(name)) for name in names)
        return Cost(tokens, tokens * passes * (3 + ("kl" in columns)))


def _lengths(name) -> list[int]:
    """Return the length of each call of a sample."""
    calls = 1 + keyed_bits("calls", *name) % CALLS
    return [1 + keyed_bits("tokens", *name, call) % LENGTH for call in range(calls)]


def _shares(calls) -> Tensor:
    """Return the share of tokens 1, 2 and 3 among all of a sample, which is its colour."""
    tokens = torch.cat([one[1] for one in calls])
    return tokens.bincount(minlength=TOKENS)[1:4] / len(tokens)
