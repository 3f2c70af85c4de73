"""LLaDA and iLLaDA: language models that fill masks, computed by transformers' own Llama without a causal mask.

| checkpoint | mask | what it is here |
|---|---|---|
| GSAI-ML/LLaDA-8B-Base, -Instruct | 126336 | a Llama whose tokens see all others (`llada_network.py`) |
| GSAI-ML/iLLaDA-8B-Instruct | 5 | the same |

What is saved has LLaDA's own names, so it is loaded by whatever loads the original.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError, first_line
from flashgrpo.files import write_json
from flashgrpo.models.conditions import fingerprint
from flashgrpo.models.llada_network import Sizes, load_llama, random_llama, renamed, weight_files
from flashgrpo.models.settings import ModelConfig
from flashgrpo.models.token_network import TokenNetwork
from flashgrpo.models.warm_start import adapters_identity
from flashgrpo.processes.tokens.model import Read, Tokens
from flashgrpo.seeds import keyed_bits
from flashgrpo.types import Condition, Prompt


class LladaModel(TokenNetwork):
    """A LLaDA checkpoint as a `TokenModel`: prompts stand left of the masks, padded on their left to one length.

    Raises:
        UserError: the tokenizer is of another vocabulary, or a prompt is too long.
    """

    without = (*TokenNetwork.without, "vae_tiling", "vae_slicing")

    def __init__(
        self, sizes: Sizes, folder: Path | None, config: ModelConfig, world: World, seed: int, keep_reference: bool
    ) -> None:
        self.sizes, self.folder = sizes, folder
        self.vocabulary = sizes.vocabulary
        self.mask: int = sizes.settings["mask_token_id"]
        self.end: int | None = sizes.settings.get("eos_token_id")
        if config.length is None:
            raise UserError("model.length: say how many tokens a text has; LLaDA's makers take 128 to 512")
        self.length = config.length
        self.tokenizer = None if folder is None else _tokenizer(folder, sizes)
        dtype = getattr(torch, config.dtype)
        network = (
            random_llama(sizes, dtype, world.device.type == "meta")
            if folder is None
            else load_llama(sizes, folder, dtype)
        )
        super().__init__(network, config, world, seed, keep_reference)

    @property
    def identity(self) -> str:
        """A digest of samples from the checkpoint's weights, or of the sizes where weights are random."""
        if self.folder is None:
            return fingerprint(Path(), [], {"random": dict(self.sizes.settings)})
        files = [file.name for file in weight_files(self.folder, self.sizes)]
        return fingerprint(self.folder, files, {}) + adapters_identity(self.config)

    # Prompts

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Return {"ids": (B, P), "count": (B,)}, P = `max_sequence_length`, of which the last `count` are tokens."""
        width = self.config.max_sequence_length
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        rows = [self._ids(prompt.text) for prompt in prompts]
        for row, own in enumerate(rows):
            if len(own) > width:
                raise UserError(
                    f"the prompt {prompts[row].text!r:.60} has {len(own)} tokens; raise model.max_sequence_length from "
                    f"{width}"
                )
            ids[row, width - len(own) :] = torch.tensor(own, dtype=torch.int64)
        count = torch.tensor([len(own) for own in rows], dtype=torch.int64)
        return Condition({"ids": ids, "count": count}).to(self.device)

    def nothing(self) -> Condition:
        """Return the condition of an empty prompt, one row."""
        return self.encode([Prompt("", {})])

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text with what the chat template puts around it."""
        return [len(self._ids(text)) for text in texts]

    def _ids(self, text: str) -> list[int]:
        if self.tokenizer is None:
            return [keyed_bits("word", word) % self.mask for word in text.split()] or [0]
        if self.tokenizer.chat_template:
            turn = [{"role": "user", "content": text}]
            text = str(self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids or [self.mask]

    # The network

    def call(self, tokens: Tokens, condition: Condition, read: Read) -> Tensor:
        """Call the network on prompts and B rows of tokens; see `TokenModel`."""
        ids, count = condition.tensors["ids"], condition.tensors["count"]
        width, length = ids.shape[1], ids.shape[1] + tokens.shape[1]
        place = torch.arange(length, device=tokens.device)[None]
        is_token = place >= width - count[:, None]
        sees = is_token[:, None, None, :].expand(-1, 1, length, -1)
        positions = (place - (width - count[:, None])).clamp(min=0)
        result: Tensor = self.network(torch.cat([ids, tokens], dim=1), sees, positions, width, read)
        return result

    def decode(self, tokens: Tokens, frames: int | None = None) -> list[str]:
        """Return texts, each up to its end."""
        return [self._text(row) for row in tokens.tolist()]

    def _text(self, row: list[int]) -> str:
        own = row[: row.index(self.end)] if self.end in row else row
        if self.tokenizer is None:
            return " ".join(map(str, own))
        return str(self.tokenizer.decode(own, skip_special_tokens=True))

    # Getting the result out

    def published_name(self, module: str) -> str:
        """Return LLaDA's name of a module."""
        names = {llama: own for own, llama in self.sizes.modules.items()}
        return names[module]

    def _save_whole(self, folder: Path) -> None:
        names = {llama: own for own, llama in self.sizes.modules.items()}
        tensors = {renamed(name, names): tensor.cpu() for name, tensor in self.network.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", dict(self.sizes.settings), indent=2)
        for file in self.folder.iterdir() if self.folder else ():
            if (
                file.is_file()
                and file.name != "config.json"
                and not any(kind in file.name for kind in (".safetensors", ".bin"))
            ):
                shutil.copy(file, folder / file.name)


def _tokenizer(folder: Path, sizes: Sizes) -> Any:
    """Load the folder's tokenizer, whose tokens have to be the network's."""
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # each library raises its own kinds
        raise UserError(
            f"model.path: the tokenizer of {sizes.where} could not be loaded: {first_line(error)}"
        ) from error
    if len(tokenizer) > sizes.vocabulary:
        raise UserError(
            f"model.path: the tokenizer of {sizes.where} has {len(tokenizer)} tokens and its network "
            f"{sizes.vocabulary}; they belong to different checkpoints"
        )
    return tokenizer
