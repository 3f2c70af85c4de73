"""The half of a pipeline model that turns prompts into rows; the encoders are in memory only while it does."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError
from flashgrpo.models.conditions import Conditions, Row, entries_of
from flashgrpo.models.residence import Residence
from flashgrpo.models.settings import ModelConfig
from flashgrpo.models.source import Source
from flashgrpo.types import IMAGE_COLUMNS, Condition, Prompt
from flashgrpo.video import cropped, image_name, open_image

MOST = 0.75  # of a picture; what keeps less of it is worth a word
MANY = 64  # prompts that are worth a word before they are encoded


class EncodesPrompts(ABC):
    """What `PipelineModel` does with prompts."""

    encoder_names: ClassVar[Sequence[str]] = ("text_encoder",)
    """Components that are needed for prompts only."""
    cached_parts: ClassVar[Sequence[str]] = ("tokenizer", "text_encoder")
    """Folders of the checkpoint on which a prompt's row depends."""
    takes_image = False
    tokenizer_name: ClassVar[str] = "tokenizer"
    """The component that counts a text's tokens: that of the encoder with the most places."""

    source: Source
    pipeline: Any
    config: ModelConfig
    device: torch.device
    say: Callable[[str], None]
    _conditions: Conditions
    _residence: Residence | None

    # What a family says

    @abstractmethod
    def encode_text(self, text: str) -> Row:
        """Return the embedding of a text by the pipeline's own encoder, rows (1, L, ...)."""

    @abstractmethod
    def random_text(self, text: str) -> Row:
        """Draw rows of the same shapes by the text, for networks with random weights, which have no encoder."""

    @property
    def image_columns(self) -> Sequence[str]:
        """Which of `IMAGE_COLUMNS` each prompt has to bring."""
        return IMAGE_COLUMNS[:1] if self.takes_image else ()

    def encode_image(self, image: Any) -> Row:
        """Return what a prompt's image adds to its row: nothing, but in a family that `takes_image`."""
        return {}

    def encode_images(self, images: Sequence[Any]) -> Row:
        """Return what the images of `image_columns` add to a row."""
        return self.encode_image(*images)

    # What all do alike

    def fitted(self, image: Any) -> Any:
        """Open a prompt's image in the size of what is made; other proportions are cut around the middle."""
        config, whole = self.config, open_image(image)
        picture = cropped(whole, config.width, config.height)
        if (kept := picture.width * picture.height / (whole.width * whole.height)) < MOST:
            made = "video's" if config.num_frames > 1 else "image's"
            self.say(
                f"{image_name(image)} is {whole.width} x {whole.height}: the middle {kept:.0%} of it fill the {made} "
                f"{config.width} x {config.height}"
            )
        return picture

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Return the rows of the prompts' texts, and of their images where the family takes them."""
        self._check_images(prompts)
        rows = self._conditions(prompts, self.device)
        if self._residence is not None:  # a prompt that was not known before, or whose entry was lost
            self.source.drop(self.encoder_names)
        return rows

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text, with the pipeline's own cleaning left out; 0 where there is no tokenizer."""
        if self.source.random:
            return [0] * len(texts)
        return [len(ids) for ids in getattr(self.pipeline, self.tokenizer_name)(list(texts)).input_ids]

    def _encode_all(self, prompts: Sequence[Prompt], world: World) -> None:
        self._check_images(prompts)
        every = [negative := Prompt(self.config.negative_prompt, {}), *prompts]
        found = world.on_all(lambda: self._conditions.missing(every, *world.place_on_machine))
        if len(missing := [every[number] for number in sorted({number for part in found for number in part})]) > MANY:
            self.say(f"encoding {len(missing)} of {len(every)} prompts, once")
        world.on_all(lambda: self._conditions.fill(missing, begin=world.rank / world.size))
        self._negative = self._conditions([negative], self.device)  # one row, the same for every sample
        self.source.drop(self.encoder_names)

    def _check_images(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            for name in self.image_columns:
                if prompt.columns.get(name) is None:
                    does = "starts from" if name == IMAGE_COLUMNS[0] else "ends with"
                    raise UserError(f"this model {does} an image: give {prompt.text!r} one in a column `{name}`")

    @torch.no_grad()
    def _row(self, prompt: Prompt) -> Row:
        """Return the row of a prompt; without an image that of its text alone."""
        if self.source.random:
            text = self.random_text(prompt.text)
        else:
            self.source.load(self.encoder_names)
            for name in self.encoder_names:
                if encoder := getattr(self.pipeline, name, None):
                    encoder.requires_grad_(False).to(self.device)
            text = self.encode_text(prompt.text)
        images = [image for name in self.image_columns if (image := prompt.columns.get(name)) is not None]
        return {**text, **self.encode_images(images)} if images else text

    def _cache_folder(self) -> Path | None:
        config, folder = self.config, self.source.folder
        settings: dict[str, Any] = {"length": config.max_sequence_length, "dtype": config.dtype}
        settings["pipeline"] = type(self.pipeline).__name__  # two with one encoder may put other words around a text
        if self.takes_image:
            size = config.num_frames, config.height, config.width
            settings |= {"size": size, "vae": config.vae_dtype, "pictures": "upright"}
        return entries_of(folder, self.cached_parts, settings, config.condition_cache) if folder else None
