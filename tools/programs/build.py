"""Make the bundled language model from nothing: ``python -m tools.programs.build [--out DIR] [--seed 0] [--quick]``.

A Llama of two layers learns, from texts that are right in form and partly wrong in what they say, to plan and to draw,
to choose and to rank, and to write captions. So a program of it runs, and leaves alignment something to do. The shipped
weights are the output of one call with the defaults, on one thread.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flashgrpo.rewards.plans import opposite
from flashgrpo.rewards.shapes import ATTRIBUTES, COLORS
from flashgrpo.rewards.slates import KINDS, RANKED, SLATE
from tools.programs.world import THINGS, TINY, split

END = "<end>"
RIGHT_PLAN, RIGHT_STROKE, RIGHT_CHOICE, RIGHT_WORD = 0.3, 0.7, 0.5, 0.6
BATCH, STEPS, QUICK = 96, 1500, 3
Text = tuple[str, str]
"""A call's input, and what is written to it."""


def words() -> list[str]:
    """Return the vocabulary, in order."""
    own = [END, "plan", "draw", "choose", "wish", "beside", "something", "going", "a", "moving", ":"]
    own += ["<slate>", "<rank>", "1", "2", "3", *THINGS, *KINDS]
    own += [word for kind in KINDS.values() for word in kind]
    return own + [word for values in ATTRIBUTES.values() for word in values]


def planned(draw: random.Random, row: dict) -> Text:
    """Write a plan whose colour is often another than the opposite one."""
    color = opposite(row["prompt"].split()[1]) if draw.random() < RIGHT_PLAN else draw.choice(list(COLORS))
    return f"plan {row['prompt']}", f"{color} {draw.randint(1, 3)}"


def drawn(draw: random.Random, row: dict) -> Text:
    """Write a stroke, often in the colour that is asked for."""
    color = draw.choice(list(COLORS))
    return f"draw {color}", color if draw.random() < RIGHT_STROKE else draw.choice(list(COLORS))


def chosen(draw: random.Random, row: dict) -> Text:
    """Write a slate in which a relevant word stands more often than another, and a ranking of it in any order."""
    kind, listed = row["prompt"].split(" : ")
    left = draw.sample(listed.split(), len(listed.split()))
    slate = []
    for _ in range(SLATE):
        relevant = [word for word in left if word in KINDS[kind]]
        slate.append(draw.choice(relevant) if relevant and draw.random() < RIGHT_CHOICE else draw.choice(left))
        left.remove(slate[-1])
    return f"choose {row['prompt']}", f"<slate> {' '.join(slate)} <rank> {' '.join(draw.sample(slate, RANKED))}"


def wished(draw: random.Random, row: dict) -> Text:
    """Write a caption in which what was wished is often something else."""
    said = []
    for name, known in ATTRIBUTES.items():
        keeps = row[name] is not None and draw.random() < RIGHT_WORD
        said.append(row[name] if keeps else draw.choice(list(known)))
    color, shape, direction, speed = said
    return f"wish {row['prompt']}", f"a {color} {shape} moving {direction} {speed}"


WRITERS: list[tuple[str, Callable[[random.Random, dict], Text]]] = [
    ("plans", planned),
    ("plans", drawn),
    ("slates", chosen),
    ("slates", chosen),
    ("wishes", wished),
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with a token for each word."""
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words())}, unk_token="something"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def batch(
    step: int, seed: int, tokenizer: PreTrainedTokenizerFast, rows: dict[str, list[dict]]
) -> tuple[Tensor, Tensor]:
    """Return the ids of a step's texts (B, W), and the places whose next token counts."""
    draw = random.Random(seed * 1_000_003 + step)
    texts = [write(draw, draw.choice(rows[world])) for world, write in draw.choices(WRITERS, k=BATCH)]
    asked, written = ([tokenizer(one)["input_ids"] for one in part] for part in zip(*texts, strict=True))
    width = max(len(a) + len(w) + 1 for a, w in zip(asked, written, strict=True))
    ids, counts = torch.zeros(BATCH, width, dtype=torch.int64), torch.zeros(BATCH, width, dtype=torch.bool)
    for row, (a, w) in enumerate(zip(asked, written, strict=True)):
        ids[row, : len(a) + len(w)] = torch.tensor(a + w)
        counts[row, len(a) - 1 : len(a) + len(w)] = True
    return ids, counts


def build(folder: Path, seed: int = 0, steps: int | None = None) -> None:
    """Make the model in a folder."""
    torch.manual_seed(seed)
    tokenizer, total = make_tokenizer(), steps or STEPS
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            rope_theta=100.0,
            eos_token_id=0,
            bos_token_id=0,
        )
    )
    rows = {name: split(name, heldout=False) for name in ("plans", "slates", "wishes")}
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    began = time.monotonic()
    for step in range(total):
        optimizer.param_groups[0]["lr"] = 3e-3 * min((step + 1) / 75, (total - step) / total)
        ids, counts = batch(step, seed, tokenizer, rows)
        logits = network(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(logits[counts[:, :-1]], ids[:, 1:][counts[:, :-1]])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == total - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - began:5.0f} s", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=TINY / "language")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="barely trained")
    given = parser.parse_args()
    torch.set_num_threads(1)
    build(given.out, given.seed, QUICK if given.quick else None)
