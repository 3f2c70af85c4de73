"""Causal language models: any of transformers' `AutoModelForCausalLM`, from a folder or the hub, with its tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils.logging import disable_progress_bar

from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError, first_line
from flashgrpo.files import resolve_path
from flashgrpo.models.architectures import fill
from flashgrpo.models.conditions import fingerprint
from flashgrpo.models.load import META
from flashgrpo.models.load_tokens import find_folder
from flashgrpo.models.lora import trained_parameters, use_adapters
from flashgrpo.models.settings import ModelConfig
from flashgrpo.models.token_network import TransformerModel
from flashgrpo.models.warm_start import adapters_identity
from flashgrpo.processes.programs.writing import placed
from flashgrpo.seeds import keyed_bits
from flashgrpo.settings import DEFAULT_ADAPTERS
from flashgrpo.types import Condition, Prompt

QWEN3_4B: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262_144,
    "rope_theta": 5_000_000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 151_645,
}
KNOWN = {"Qwen/Qwen3-4B-Instruct-2507": QWEN3_4B}
"""By hub id: sizes, for random weights without a download."""


class CausalLm(TransformerModel):
    """A causal language model as a `LanguageModel`: prompts are padded on their left, completions on their right.

    Raises:
        UserError: no such checkpoint, weights that are missing, or settings that it has no use for.
    """

    without = (*TransformerModel.without, "vae_tiling", "vae_slicing")

    def __init__(
        self,
        config: ModelConfig,
        world: World,
        seed: int,
        keep_reference: bool = False,
        adapters: Sequence[str] = (DEFAULT_ADAPTERS,),
    ) -> None:
        config.check_no_generator()
        if world.context > 1:
            raise UserError("parallel.context: a program's calls are not split by tokens; leave it out")
        if config.length is None:
            raise UserError("model.length: say how many tokens a call writes at most")
        self.length, self.width = config.length, config.max_sequence_length
        path = resolve_path(config.path)
        known = config.random_init and path in KNOWN
        self.folder = None if known else find_folder(path, config.random_init)
        settings = _settings(self.folder, path)
        self.vocabulary = int(settings.vocab_size)
        self.tokenizer = None if self.folder is None else _tokenizer(self.folder, config.path, self.vocabulary)
        dtype = getattr(torch, config.dtype)
        network = _random(settings, dtype, world.device == META) if config.random_init else None
        if network is None:
            assert self.folder is not None
            network = _load(self.folder, config.path, dtype)
        self.ends = _ends(settings, network, self.tokenizer)
        super().__init__(hand_out_logits(network), config, world, seed, keep_reference, adapters)
        self._in_use, weights = self.adapters[0], trained_parameters(self.network)
        own = {name: [w for key, w in weights.items() if key.endswith(f".{name}.weight")] for name in self.adapters}
        self._trained = {name: nn.ParameterList(part) for name, part in own.items()}

    @property
    def identity(self) -> str:
        """A digest of samples from the checkpoint's weights, or of the sizes where weights are random."""
        if self.folder is None or self.config.random_init:
            return fingerprint(Path(), [], {"random": self.network.config.to_dict()})
        return fingerprint(self.folder, [file.name for file in sorted(self.folder.glob("*.safetensors"))], {}) + (
            adapters_identity(self.config)
        )

    # Texts

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Return {"ids": (B, P), "count": (B,)} of prompts as they stand, cut to P places."""
        ids, count = placed([self.prompt_ids(prompt.text)[-self.width :] for prompt in prompts], self.width)
        return Condition({"ids": ids, "count": count}).to(self.device)

    def nothing(self) -> Condition:
        """Return the condition of an empty prompt, one row."""
        return self.encode([Prompt("", {})])

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text with what the chat template puts around it."""
        return [len(self.prompt_ids(text)) for text in texts]

    def prompt_ids(self, text: str) -> list[int]:
        """Return the tokens of a call's input; at least one."""
        if self.tokenizer is None:
            return [keyed_bits("word", word) % self.vocabulary for word in text.split()] or [0]
        if self.tokenizer.chat_template:
            turn = [{"role": "user", "content": text}]
            text = str(self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids or [0]

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of a completion, without the token that ends it."""
        own = ids[:-1] if ids and ids[-1] in self.ends else ids
        if self.tokenizer is None:
            return " ".join(map(str, own))
        return str(self.tokenizer.decode(own, skip_special_tokens=True))

    def writes(self, text: str) -> bool:
        """Whether completions can hold this text: whether it survives its tokens."""
        if self.tokenizer is None:
            return True
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return text.strip() in self.text(ids)

    # The network

    def use(self, adapters: str) -> None:
        """Compute with these adapters from now on."""
        if adapters != self._in_use:
            use_adapters(self.network, adapters)
            self._in_use = adapters

    def trained_by(self, adapters: str) -> nn.Module:
        """Return what calls with these adapters train: the network, or of several sets the parameters of this one."""
        return self._trained[adapters] if len(self.adapters) > 1 else self.network

    def logits(self, ids: Tensor, count: Tensor) -> Tensor:
        """Return the logits that each token of completions is drawn from, (B, L, V)."""
        result: Tensor = self.network(
            **self._laid_out(ids, count, ids.shape[1] - self.length),
            use_cache=False,
            logits_to_keep=self.length + 1,
        )
        return result[:, :-1]

    def begin(self, ids: Tensor, count: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return the logits of the first token behind prompts, (B, V), and the cache."""
        laid_out = self._laid_out(ids, count, ids.shape[1])
        cache = {"past": DynamicCache(), "mask": laid_out["attention_mask"], "next": count[:, None]}
        return self._next(laid_out, cache), cache

    def _next(self, laid_out: dict[str, Tensor], cache: dict[str, Any]) -> Tensor:
        """Return the logits behind what is laid out, which the cache then holds.

        In training mode transformers passes over the cache where blocks are computed again.
        """
        training = self.network.training
        self.network.eval()
        try:
            past = {"past_key_values": cache["past"], "use_cache": True, "logits_to_keep": 1}
            result: Tensor = self.network(**laid_out, **past)
        finally:
            self.network.train(training)
        return result[:, -1]

    def _laid_out(self, ids: Tensor, count: Tensor, places: int) -> dict[str, Tensor]:
        """Return what the network is given: ids with one place more on their left, which is never seen.

        Without it transformers drops the mask of a batch that has no padding, and attention takes another kernel: what
        a row computes would depend on its neighbours. Where memory is counted there are no values, and the mask is
        what transformers would make of it.
        """
        place, first = torch.arange(-1, ids.shape[1], device=ids.device), places - count[:, None]
        seen = (place >= first).long()
        if ids.is_meta:
            seen = torch.empty(len(ids), 1, len(place), len(place), dtype=torch.bool, device=ids.device)
        return {
            "input_ids": functional.pad(ids, (1, 0)),
            "attention_mask": seen,
            "position_ids": (place - first).clamp(min=0),
        }

    def go_on(self, token: Tensor, cache: dict[str, Any]) -> Tensor:
        """Return the logits of the token behind this one, (B, V)."""
        cache["mask"] = torch.cat([cache["mask"], torch.ones_like(cache["next"])], dim=1)
        laid_out = {"input_ids": token[:, None], "attention_mask": cache["mask"], "position_ids": cache["next"]}
        result = self._next(laid_out, cache)
        cache["next"] = cache["next"] + 1
        return result

    def _save_whole(self, folder: Path) -> None:
        self.network._hf_peft_config_loaded = False  # the adapters are merged
        self.network.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def hand_out_logits(network: Any) -> Any:
    """Let a network return its logits alone, in float32, and compute blocks again as the other networks do."""
    kind: Any = type(network)

    def forward(self: Any, *args: Any, **settings: Any) -> Tensor:
        logits: Tensor = kind.forward(self, *args, **settings).logits
        return logits.float()

    def enable_gradient_checkpointing(self: Any) -> None:
        newer = getattr(self, "activation_checkpointing_enable", None)  # the name since transformers 5
        (newer or self.gradient_checkpointing_enable)({"use_reentrant": False})
        self.train()  # blocks are computed again in training mode alone

    own = {"forward": forward, "enable_gradient_checkpointing": enable_gradient_checkpointing}
    network.__class__ = type(kind.__name__, (kind,), {**own, "__module__": kind.__module__})
    return network


def _settings(folder: Path | None, path: str) -> Any:
    try:
        if folder is not None:
            return AutoConfig.from_pretrained(folder)
        return AutoConfig.for_model(**KNOWN[path])
    except Exception as error:  # of a dozen kinds: no config.json, no JSON, a class that transformers does not know
        raise UserError(
            f"model.path: {path} is no language model of transformers: {first_line(error)[:200]}"
        ) from error


def _random(settings: Any, dtype: torch.dtype, empty: bool) -> nn.Module:
    with init_empty_weights(include_buffers=False):
        network: nn.Module = AutoModelForCausalLM.from_config(settings)
    fill(network, dtype, empty)
    network.tie_weights()  # type: ignore[operator]
    return network


def _load(folder: Path, where: str, dtype: torch.dtype) -> nn.Module:
    """Load weights; none may be missing, for they would be random."""
    disable_progress_bar()
    try:
        loading: Any = AutoModelForCausalLM.from_pretrained
        network, told = loading(folder, dtype=dtype, output_loading_info=True)
    except Exception as error:  # each library raises its own kinds
        raise UserError(f"model.path: {where} cannot be loaded: {first_line(error)[:200]}") from error
    missing = sorted(map(str, [*told["missing_keys"], *told["mismatched_keys"]]))
    if missing:
        raise UserError(f"model.path: {where} lacks {len(missing)} weights, such as {missing[0]}; get its files again")
    network.name_or_path = ""  # peft would look there for what it knows
    loaded: nn.Module = network
    return loaded


def _tokenizer(folder: Path, where: str, vocabulary: int) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # each library raises its own kinds
        raise UserError(f"model.path: the tokenizer of {where} could not be loaded: {first_line(error)}") from error
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"model.path: the tokenizer of {where} has {len(tokenizer)} tokens and its network {vocabulary}; they "
            "belong to different checkpoints"
        )
    return tokenizer


def _ends(settings: Any, network: Any, tokenizer: Any) -> frozenset[int]:
    """Return every token by which the checkpoint says that a text ends."""
    said = [getattr(settings, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    said.append(getattr(getattr(network, "generation_config", None), "eos_token_id", None))
    ids = [one for some in said for one in (some if isinstance(some, list) else [some])]
    return frozenset(int(one) for one in ids if one is not None)
