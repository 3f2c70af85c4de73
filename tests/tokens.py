"""A token network that fits on a page: what the processes of tokens ask of a model, without a checkpoint."""

from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flashgrpo.distributed.world import current_device
from flashgrpo.models.lora import weights_replaced
from flashgrpo.processes.tokens.uniform.settings import Metric
from flashgrpo.seeds import normal
from flashgrpo.types import Condition, to_device

WIDTH, HIDDEN = 8, 16  # numbers that stand for a text; of the hidden state of a token


class Filler(nn.Module):
    """Sees all tokens at once: hidden states (B, L, HIDDEN), and a head to V logits.

    Each row is computed by products whose sizes are multiples of four.
    """

    def __init__(self, length: int, ids: int, vocabulary: int):
        super().__init__()
        self.length = length
        self.embedding = nn.Embedding(ids, WIDTH)
        self.mix = nn.Linear(length * WIDTH + WIDTH, length * HIDDEN)
        self.head = nn.Linear(HIDDEN, vocabulary)

    def forward(self, tokens: Tensor, text: Tensor, read) -> Tensor:
        seen = torch.cat([self.embedding(tokens).flatten(1), text], dim=1)
        return read(self.mix(seen).tanh().view(-1, self.length, HIDDEN), self.head)


class TokenDouble:
    """A `TokenModel` of random weights.

    Args:
        mask, end: tokens that stand for a mask, and for the end of a text; the mask is one that can be drawn where it
            is below `vocabulary`.
    """

    identity = "token double"
    recomputes = False

    def __init__(self, length=8, vocabulary=8, mask: int | None = 8, end: int | None = None):
        self.length, self.vocabulary, self.mask, self.end = length, vocabulary, mask, end
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = Filler(length, max(vocabulary, (mask or 0) + 1), vocabulary)
        self.device = current_device()
        self.network.to(self.device)
        self._base = {name: weight.detach().clone() for name, weight in self.network.named_parameters()}

    def encode(self, prompts):
        rows = [normal((1, WIDTH), prompt.text, "text") for prompt in prompts]
        return Condition({"text": to_device(torch.cat([torch.empty(0, WIDTH), *rows]), self.device)})

    def nothing(self):
        return Condition({"text": torch.zeros(1, WIDTH, device=self.device)})

    def token_counts(self, texts):
        return [len(text.split()) for text in texts]

    def call(self, tokens, condition, read):
        return self.network(tokens, condition.tensors["text"], read)

    def decode(self, tokens, frames=None):
        """Paint videos (B, F, 3, 16, 16), each in one colour: the share of tokens 1, 2 and 3."""
        shares = torch.stack([(tokens == token).float().mean(1) for token in (1, 2, 3)], dim=1)
        return shares[:, None, :, None, None].expand(-1, frames or 1, -1, 16, 16).contiguous()

    def reference(self) -> AbstractContextManager[None]:
        return weights_replaced(self.network, self._base)

    def save_lora(self, folder: Path, tensors, style="diffusers"):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "policy.safetensors")
        return ["policy.safetensors"]

    def save_merged(self, folder: Path, tensors):
        self.save_lora(folder, tensors)


class TokenPictures(TokenDouble):
    """A `UniformModel`: 16 tokens of 8 kinds, a grid of colours, and what a checkpoint says of its noise."""

    path, shift = Metric(), 1.0

    def __init__(self):
        super().__init__(length=16, mask=None)
        self.codes = to_device(normal((self.vocabulary, 4), 0, "codes"), self.device)

    def decode(self, tokens, frames=None):
        """Paint images (B, 1, 3, 16, 16), a colour by the bits of each token."""
        bits = torch.stack([(tokens >> bit) % 2 for bit in range(3)], dim=1).float()
        return bits.view(-1, 1, 3, 4, 4).repeat_interleave(4, -1).repeat_interleave(4, -2)
