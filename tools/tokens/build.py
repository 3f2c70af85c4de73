"""Make a bundled model of tokens from nothing: ``python -m tools.tokens.build NAME [--out DIR] [--seed 0] [--quick]``.

| NAME | what it is | what it learns |
|---|---|---|
| uniform | a checkpoint of URSA: Qwen3, codes on a colour wheel, a decoder of images | grids, of uniform noise |
| masked | a checkpoint of LLaDA: a Llama that sees all tokens | grids as texts, of masks |
| sudoku | the same | sudokus, of masks |

Captions of grids are right until the words are known, and then wrong in part (`WRONG`): so a model draws clean grids
and follows its prompt imperfectly, which leaves alignment something to do. The sudokus are imperfect because their
training is short. The shipped weights are the output of one call each with the defaults, on one thread.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from flashgrpo.models.llada_network import FullAttentionLlama, Sizes
from flashgrpo.models.ursa.checkpoint import IBQ, TRANSFORMER
from flashgrpo.models.ursa.decoder import IbqDecoder
from flashgrpo.models.ursa.network import UrsaNetwork, places_of
from flashgrpo.processes.tokens.chunks import categorical
from flashgrpo.processes.tokens.uniform.path import MetricPath
from flashgrpo.processes.tokens.uniform.settings import Metric
from flashgrpo.rewards.grids import COLORS, COUNTS, SIZE, SQUARES, paint
from tools.tokens.world import TINY, captions, draw_grids, puzzle_of, sudokus, write_puzzle

TEXT = 8  # tokens that a caption is padded to
CELL = 8  # pixels
WIDTH, LAYERS, HEADS = 64, 3, 4
WRONG = 0.5  # of the words of a caption that are drawn anew, once words are known
QUICK = 3  # steps, to test the recipe itself
PAD, BOV, MASK = "<pad>", "<bov>", "<mask>"


def words_of_captions() -> list[str]:
    """Return every word of a caption, the comma among them."""
    return [*COUNTS, *COLORS, "cells", ",", "the", "rest"]


def make_tokenizer(words: Sequence[str], special: Sequence[str], joined: bool = False) -> PreTrainedTokenizerFast:
    """Make a tokenizer with a token for each word; where `joined`, what it decodes has no blanks of its own."""
    vocabulary = {word: number for number, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[0]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if joined:
        tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, unk_token=special[0])


def padded(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, width: int) -> Tensor:
    """Return ids (B, width), padded on the left."""
    rows = [tokenizer(text)["input_ids"] for text in texts]
    return torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])


def partly_wrong(texts: Sequence[str], draw: random.Random) -> list[str]:
    """Draw some of the words of captions anew."""

    def one(text: str) -> str:
        count, color, _, _, _, rest = text.split()
        count = draw.choice(list(COUNTS)) if draw.random() < WRONG else count
        color = draw.choice(list(COLORS)) if draw.random() < WRONG else color
        rest = draw.choice(list(COLORS)) if draw.random() < WRONG else rest
        return f"{count} {color} cells, the rest {rest}"

    return [one(text) for text in texts]


def fit(network: nn.Module, loss: Callable[[int], Tensor], steps: int, lr: float) -> None:
    """Minimise a loss by AdamW, the rate rising for a twentieth of the steps and then falling to 0 along a line."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    began, rise = time.monotonic(), max(1, steps // 20)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / rise, (steps - step) / max(1, steps - rise))
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {value.item():.4f}  {time.monotonic() - began:5.0f} s", flush=True)


def captioned_grids(step: int, steps: int, batch: int, seed: int) -> tuple[list[str], Tensor]:
    """Return captions and grids of a step; in the second half captions are wrong in part."""
    draw = random.Random(seed * 1_000_003 + step)
    texts = draw.choices(captions(heldout=False), k=batch)
    grids = draw_grids(texts, torch.Generator().manual_seed(seed * 1_000_003 + step))
    return (texts if step < steps // 2 else partly_wrong(texts, draw)), grids


def build_uniform(folder: Path, seed: int, steps: int | None) -> None:
    """Make the model of uniform tokens."""
    tokenizer = make_tokenizer(words_of_captions(), [PAD, BOV])
    settings = {
        **dict(TRANSFORMER),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "head_dim": WIDTH // HEADS,
        "rope_theta": 100,
        "lm_vocab_size": len(tokenizer),
        "lm_head_size": len(COLORS),
        "vocab_size": len(tokenizer) + len(COLORS),
        "bov_token_id": tokenizer.convert_tokens_to_ids(BOV),
    }
    angle = torch.arange(len(COLORS)) * (2 * torch.pi / len(COLORS))
    codes, metric = torch.stack([angle.cos(), angle.sin()], dim=1), Metric()
    path, places = MetricPath(codes, metric), places_of(TEXT, 1, SIZE, SIZE)
    network = UrsaNetwork(settings)
    total = steps or 1800

    def loss(step: int) -> Tensor:
        texts, grids = captioned_grids(step, total, 64, seed)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step + 7)
        clean = grids.flatten(1)
        t = torch.rand(len(clean), generator=generator, dtype=torch.float64)
        noised = categorical(path.probs(t, clean), torch.rand(clean.shape, generator=generator, dtype=torch.float64))
        logits: Tensor = network(padded(texts, tokenizer, TEXT), noised, places, lambda hidden, head: head(hidden))
        return functional.cross_entropy(logits.flatten(0, 1), clean.flatten())

    fit(network, loss, total, 3e-3)
    vae = {**dict(IBQ), "num_vq_embeddings": len(COLORS), "vq_embed_dim": 4, "latent_channels": 16}
    vae |= {"block_out_channels": (16, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "spatial_stride": CELL}
    decoder = fit_decoder(vae, seed, steps and QUICK)
    for part in ("transformer", "vae", "scheduler"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    _write(folder / "transformer", network, settings, "diffusion_pytorch_model.safetensors")
    _write(folder / "vae", decoder, {**vae, "_class_name": "AutoencoderVQ"}, "diffusion_pytorch_model.safetensors")
    scheduler = {"alpha": metric.alpha, "c": metric.c, "shift": 1.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    torch.save({"path.emb": codes}, folder / "scheduler" / "scheduler_model.pth")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "URSAPipeline"}) + "\n")
    tokenizer.save_pretrained(folder / "tokenizer")


def fit_decoder(vae: dict[str, Any], seed: int, steps: int | None) -> IbqDecoder:
    """Train a decoder of codes to paint cells."""
    torch.manual_seed(seed)
    decoder = IbqDecoder(vae)
    forward = IbqDecoder.forward.__wrapped__  # type: ignore[attr-defined]  # with gradients

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        colors = torch.randint(len(COLORS), (8, len(COLORS)), generator=generator)
        power = 10 * torch.rand(8, 1, generator=generator) ** 2  # the higher, the more cells of the first colour
        which = torch.rand(8, SIZE * SIZE, generator=generator) ** power * len(COLORS)
        cells = colors.gather(1, which.long().clamp(max=len(COLORS) - 1)).view(-1, SIZE, SIZE)
        wanted: Tensor = paint(cells, CELL) * 2 - 1
        return (forward(decoder, cells[:, None]) - wanted).square().mean()

    fit(decoder, loss, steps or 1000, 5e-3)
    return decoder


def build_masked(folder: Path, seed: int, steps: int | None) -> None:
    """Make the model of masked tokens that writes grids."""
    tokenizer = make_tokenizer([*words_of_captions(), *SQUARES.values(), "\n"], [PAD], joined=True)
    squares = torch.tensor(tokenizer.convert_tokens_to_ids([*SQUARES.values(), "\n"]))
    total = steps or 1800

    def batch(step: int) -> tuple[Tensor, Tensor]:
        texts, grids = captioned_grids(step, total, 64, seed)
        lines = functional.pad(grids, (0, 1), value=len(COLORS))
        return padded(texts, tokenizer, TEXT)[:, 1:], squares[lines].flatten(1)

    _build_llada(folder, tokenizer, batch, total)


def build_sudoku(folder: Path, seed: int, steps: int | None) -> None:
    """Make the model of masked tokens that fills sudokus."""
    tokenizer = make_tokenizer([*"1234", "_", "/", "\n"], [PAD], joined=True)
    digits = torch.tensor([tokenizer.convert_tokens_to_ids(token) for token in ("\n", *"1234")])
    filled, total = sudokus(heldout=False), steps or 600

    def batch(step: int) -> tuple[Tensor, Tensor]:
        draw = random.Random(seed * 1_000_003 + step)
        grids = draw.choices(filled, k=64)
        texts = [write_puzzle(puzzle_of(grid, draw.randint(6, 9), draw)) for grid in grids]
        lines = functional.pad(torch.tensor(grids).view(-1, 4, 4), (0, 1), value=0)
        return padded(texts, tokenizer, 19), digits[lines].flatten(1)

    _build_llada(folder, tokenizer, batch, total)


def _build_llada(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    total: int,
) -> None:
    """Train a network to fill masks: each token of a text is masked with a probability that the text draws."""
    settings = {
        "model_type": "llada",
        "d_model": WIDTH,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "mlp_hidden_size": 2 * WIDTH,
        "vocab_size": len(tokenizer) + 1,
        "mask_token_id": len(tokenizer),
        "rope_theta": 100.0,
        "max_sequence_length": 64,
    }
    sizes = Sizes(str(folder), settings)
    network = FullAttentionLlama(sizes.llama())

    def loss(step: int) -> Tensor:
        prompt, answer = batch(step)
        generator = torch.Generator().manual_seed(step + 7)
        chance = torch.rand(len(answer), 1, generator=generator).clamp(min=0.05)
        masked = torch.rand(answer.shape, generator=generator) < chance
        seen = torch.cat([prompt, answer.masked_fill(masked, sizes.settings["mask_token_id"])], dim=1)
        sees = torch.ones(1, 1, seen.shape[1], seen.shape[1], dtype=torch.bool).expand(len(seen), -1, -1, -1)
        places = torch.arange(seen.shape[1])[None]
        logits: Tensor = network(seen, sees, places, prompt.shape[1], lambda hidden, head: head(hidden[masked]))
        return functional.cross_entropy(logits, answer[masked])

    fit(network, loss, total, 3e-3)
    names = {llama: own for own, llama in sizes.modules.items()}
    tensors = {}
    for name, tensor in network.state_dict().items():
        module, _, kind = name.rpartition(".")
        tensors[f"{names[module]}.{kind}"] = tensor.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tokenizer.save_pretrained(folder)


def _write(folder: Path, network: nn.Module, settings: dict[str, Any], name: str) -> None:
    tensors = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
    save_file(tensors, folder / name, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


BUILDERS = {"uniform": build_uniform, "masked": build_masked, "sudoku": build_sudoku}


def build(name: str, folder: Path, seed: int = 0, steps: int | None = None) -> None:
    """Make one of the models in a folder."""
    torch.manual_seed(seed)
    BUILDERS[name](folder, seed, steps)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=BUILDERS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="barely trained")
    given = parser.parse_args()
    torch.set_num_threads(1)
    build(given.name, given.out or TINY / given.name, given.seed, QUICK if given.quick else None)
