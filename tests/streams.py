"""A streaming model that fits on a page, and the streaming process over it, whose branches compete."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from flashgrpo.distributed.world import current_device, single_process
from flashgrpo.models.lora import weights_replaced
from flashgrpo.processes.streaming.cache import CachedBlock, Context
from flashgrpo.processes.streaming.process import StreamingProcess
from flashgrpo.processes.streaming.settings import Energy, Routing, StreamRollout
from flashgrpo.processes.streaming.window import Window
from flashgrpo.seeds import normal
from flashgrpo.types import Condition, to_device

WIDTH, CHANNELS, BLOCK, FRAMES = 8, 4, 2, 12  # numbers of a text; of a frame, which is a pixel; of a block; of a video
ROUTED = Routing(blocks=2, routed=1, nearest=2, reach=4, earliest=4)


@dataclass(frozen=True)
class Remembered:
    """What the decoder remembers: the sum of all frames so far."""

    total: Tensor

    def expanded(self, rows: int) -> "Remembered":
        """Return that of equal videos."""
        return Remembered(self.total.expand(rows, -1))


class StreamDouble:
    """A `StreamingModel` of random weights: a block's velocity, from itself, its text, and what it attends to.

    A frame is remembered by what the network says of it at level 0: contexts depend on the weights, as keys do.

    Args:
        first: frames of the first block, if it is a shorter one; such a model is taken to draw along a straight line.
    """

    identity = "stream double"
    recomputes = False
    stride = 1

    def __init__(self, first=0):
        self.window, self.levels = Window(sink=1, local=4, block=BLOCK, first=first), (1.0, 0.5)
        self.latent_shape = (CHANNELS, FRAMES + first, 1, 1)
        self.renoises = not first
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            own = CHANNELS * BLOCK
            self.network = nn.Sequential(nn.Linear(own + CHANNELS + WIDTH + 4, own), nn.Tanh(), nn.Linear(own, own))
        self.device = current_device()
        self.network.to(self.device)
        self.base = {name: weight.detach().clone() for name, weight in self.network.named_parameters()}

    def encode(self, prompts):
        rows = [normal((1, WIDTH), prompt.text, "text") for prompt in prompts]
        return Condition({"text": to_device(torch.cat([torch.empty(0, WIDTH), *rows]), self.device)})

    def token_counts(self, texts):
        return [len(text.split()) for text in texts]

    def nothing(self):
        return Condition({"text": torch.zeros(1, WIDTH, device=self.device)})

    def velocity(self, x, sigma, start, context, condition):
        if context is None:
            seen = torch.zeros(len(x), CHANNELS, device=self.device)
        else:
            seen = context.keys[0].mean(dim=1).flatten(1).expand(len(x), -1)
        level = torch.full((len(x), 4), sigma, device=self.device)
        whole = pad(x, (0, 0, 0, 0, 0, BLOCK - x.shape[2]))
        given = torch.cat([whole.flatten(1), seen, condition.tensors["text"], level], dim=1)
        return self.network(given).view_as(whole)[:, :, : x.shape[2]]

    @torch.no_grad()
    def commit(self, cache, x0, context, condition):
        seen = self.velocity(x0, 0.0, cache.end, context, condition)
        keys = seen[..., 0, 0].transpose(1, 2).unsqueeze(2)
        frames = range(cache.end, cache.end + x0.shape[2])
        return cache.append(CachedBlock(frames, Context((keys,), (keys,))))

    def recache(self, cache, x0, condition):
        first = cache.end - x0.shape[2]
        renewed = cache.before(first)
        for block in x0.split([self.window.size(f) for f in self.window.starts(cache.end) if f >= first], dim=2):
            renewed = self.commit(renewed, block, None, condition)
        return renewed

    def pipeline_call(self, given):
        return None

    def decode(self, latents, state=None):
        """Paint frames (B, F, 3, 1, 1), each by what has been seen so far."""
        before = torch.zeros(len(latents), CHANNELS, device=self.device) if state is None else state.total
        total = before[:, :, None] + latents[..., 0, 0].cumsum(dim=2)
        video = total[:, :3].sigmoid().transpose(1, 2)[..., None, None]
        return video, Remembered(total[:, :, -1])

    def reference(self) -> AbstractContextManager[None]:
        return weights_replaced(self.network, self.base)

    def save_lora(self, folder: Path, tensors, style="diffusers"):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "policy.safetensors")
        return ["policy.safetensors"]

    def save_merged(self, folder: Path, tensors):
        self.save_lora(folder, tensors)


class Stream(StreamingProcess):
    """The process over the double: a unit is a branch with one term, its slot is the fork's frame.

    Args:
        anchored: whether each group has a sample that sees the past as it is; `cost` counts it.
        whole: whether videos are drawn to their end.
        first: of the model.
    """

    def __init__(
        self,
        anchored=False,
        micro_batch=4,
        prompts=2,
        group_size=4,
        explore=ROUTED,
        score=None,
        whole=True,
        first=0,
    ):
        sizes = {"prompts": prompts, "group_size": group_size, "micro_batch": micro_batch, "first_block": first}
        rollout = StreamRollout(sink=1, local=4, block=BLOCK, **sizes)
        score = score or Energy(trained_levels=1)
        super().__init__(StreamDouble(first), explore, score, rollout, micro_batch, anchored, whole, single_process())


def number_of(outputs: Tensor) -> Tensor:
    """Return a number of each video, (B, 1), by which tests judge it: the mean over the end of its first channel."""
    return outputs[:, 0, -4:].flatten(1).mean(dim=1, keepdim=True)
