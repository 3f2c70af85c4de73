"""Where a model's components come from: a checkpoint's folder, from which the large ones are loaded when needed."""

import gc
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from flashgrpo.errors import UserError
from flashgrpo.models.architectures import Architecture, is_component, package_of
from flashgrpo.models.settings import ModelConfig
from flashgrpo.models.weights import load_network

LIBRARIES = ("diffusers", "transformers")
"""Where the classes of networks may come from; a folder that names another could have its own code run."""
LARGE = (
    *("transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder"),
    *("connectors", "prompt_enhancer"),
)
DECODERS = ("vae", "audio_vae", "vocoder")
"""What turns latents into videos and sound; they are in memory all the time."""


class Source:
    """The components of a pipeline; the large ones are None until they are loaded.

    Args:
        architecture: class and sizes of the pipeline, whose components get random weights with `config.random_init`.
        folder: the checkpoint; None for random weights.
        empty: have no weights at all (the meta device), to count them.

    Raises:
        UserError: a component is missing, unreadable, or lacks weights.
    """

    def __init__(
        self, architecture: Architecture, folder: Path | None, config: ModelConfig, empty: bool = False
    ) -> None:
        self.architecture = architecture
        self.folder = folder
        self._config = config
        self._empty = empty
        self._lacking: set[str] = set()  # components that the checkpoint turned out not to have
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
            library.utils.logging.set_verbosity_error()  # what they warn of here is not the user's to fix
        self._class: Any = getattr(diffusers, architecture.family)
        settings = {k: v for k, v in architecture.settings.items() if k in self._signature()}
        if folder is None:
            light = self._build([name for name in architecture.components if name not in LARGE])
            nothing = dict.fromkeys(self._class._get_signature_keys(self._class)[0])
            self.pipeline = self._class(**{**nothing, **light}, **settings)
        else:
            decoders = {name: self._network(name) for name in self._among(DECODERS)}
            self.pipeline = self._from_folder({**dict.fromkeys(self._among(LARGE)), **decoders})
        for decoder in self.decoders.values():
            decoder.requires_grad_(False)

    @property
    def random(self) -> bool:
        """Whether weights are random and there are no encoders."""
        return self.folder is None

    @property
    def decoders(self) -> dict[str, Any]:
        """Those of `DECODERS` that the pipeline has."""
        return {name: getattr(self.pipeline, name) for name in self._among(DECODERS)}

    def load(self, names: Sequence[str]) -> None:
        """Load those of the components that the checkpoint has and that are not loaded."""
        absent = [name for name in self._among(names) if getattr(self.pipeline, name, None) is None]
        wanted = [name for name in absent if name not in self._lacking]
        if self.folder is None:
            self.pipeline.register_modules(**self._build(wanted))
            return
        for name in wanted:
            self.pipeline.register_modules(**{name: self._network(name)})
            if getattr(self.pipeline, name) is None:
                self._lacking.add(name)

    def drop(self, names: Sequence[str]) -> None:
        """Take components out of memory."""
        loaded = [name for name in self._among(names) if getattr(self.pipeline, name, None) is not None]
        for name in loaded:
            setattr(self.pipeline, name, None)
        if not loaded:
            return
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _build(self, names: Sequence[str]) -> dict[str, Any]:
        return self.architecture.build(names, self._dtypes(), self._empty)

    def _among(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self._signature()]

    def _signature(self) -> list[str]:
        return [name for names in self._class._get_signature_keys(self._class) for name in names]

    def _dtypes(self) -> dict[str, torch.dtype]:
        dtype, vae = getattr(torch, self._config.dtype), getattr(torch, self._config.vae_dtype)
        return {"default": dtype, **dict.fromkeys(DECODERS, vae), "image_encoder": torch.float32}  # as Wan's users do

    def _network(self, name: str) -> Any:
        """Load a component that has weights; None where the checkpoint has none and the pipeline can do without."""
        assert self.folder is not None
        where = f"model.path: {name} of {self._config.path}"
        entry: Any = self._class.load_config(self.folder).get(name)
        library, kind = entry if is_component(entry) else (None, None)
        if kind is None and name in self._class._optional_components:
            return None
        own = package_of(self.architecture.family)
        known = own if library == own.__name__.rpartition(".")[2] else None
        known = importlib.import_module(library) if library in LIBRARIES else known
        found: Any = getattr(known, str(kind), None)
        if found is None:
            raise UserError(f"{where} is {kind} of {library}, which is no network of {' or '.join(LIBRARIES)}")
        dtypes = self._dtypes()
        settings = {"dtype": dtypes.get(name, dtypes["default"]), "low_cpu_mem_usage": True}
        return load_network(found, self.folder / name, where, **settings)

    def _from_folder(self, known: dict[str, Any]) -> Any:
        """Load what has no weights; `known` are the components that have some, or None."""
        try:
            return self._class.from_pretrained(self.folder, **known)
        except Exception as error:  # diffusers, transformers and tokenizers each raise their own kinds
            reason = " ".join(str(error).split())[:200]
            name = self._class.__name__
            raise UserError(f"model.path: {self._config.path} could not be loaded as a {name}: {reason}") from error
