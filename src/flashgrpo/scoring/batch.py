"""Samples that were drawn together, as rewards take them."""

import tempfile
import threading
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from flashgrpo.errors import UserError
from flashgrpo.media import suffix_of, with_sound, write_medium
from flashgrpo.prompts import columns_of
from flashgrpo.scoring.inputs import Input, LatentVideos, Pixels, VideoFiles, kinds
from flashgrpo.scoring.loading import checked_values, declared, told
from flashgrpo.types import Failed, Media, Prompt, Reward, Waves

Columns = Mapping[str, Sequence[float]]
"""Component -> a value for each sample."""


class Batch:
    """Samples that were drawn together, in each form that a reward takes; a form is made once, when first asked for.

    Args:
        media: (B, F, 3, H, W) on the CPU, or B texts; None where no reward asks for what is decoded.
        latents: what was drawn: (B, C, F, H, W), or tokens (B, ...); None where no reward asks for them.
        sound: of videos, (B, channels, samples) on the CPU at `sample_rate`; None where no reward hears.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        fps: float,
        media: Media | None = None,
        latents: Tensor | None = None,
        sound: Waves | None = None,
        sample_rate: int | None = None,
    ) -> None:
        self.prompts = prompts
        self._sound, self._rate = sound, sample_rate
        self._fps, self._media, self._latents = fps, media, latents
        self._texts: Sequence[str] = media if isinstance(media, list) else ()
        self._forms: dict[Input, Any] = {}
        self._sums: dict[Input, int] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.Lock()
        self._left = 0
        self._several = False

    def wanted_by(self, count: int) -> None:
        """So many rewards will score it."""
        self._left = count
        self._several = count > 1

    def done(self) -> None:
        """One of them has; after the last nothing of the batch is kept."""
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._forms.clear()
                self._media = self._latents = self._sound = None
                if self._folder is not None:
                    self._folder.cleanup()

    def values(self, name: str, reward: Reward, takes: Input) -> Columns:
        """Return what the reward finds of each sample, by component; of one that has failed, what it comes with.

        Raises:
            UserError: as `scored_by`.
            ValueError: it returned something else than numbers.
        """
        found = checked_values(self.scored_by(name, reward, takes), len(self.prompts), f"reward {name}")
        failed = {row: one.reward for row, one in enumerate(self._texts) if isinstance(one, Failed)}
        return {part: [failed.get(row, value) for row, value in enumerate(of)] for part, of in found.items()}

    def scored_by(self, name: str, reward: Reward, takes: Input) -> Any:
        """Return what the reward returns for this batch.

        Raises:
            UserError: it refused its input, or changed it.
        """
        if isinstance(self._media, list) and not {"texts", "latents"} & {*kinds(takes)}:
            what = "files" if isinstance(takes, VideoFiles) else "frames of a stride, rate or size"
            raise UserError(f"reward {name} looks at {what}, and this model makes texts")
        given = self._form(takes)
        version = given._version if isinstance(given, Tensor) else 0
        texts = [prompt.text for prompt in self.prompts]
        columns: dict[str, Any] = columns_of(self.prompts)
        if declared(reward, "hears", False):
            if self._sound is None:
                raise UserError(f"reward {name} hears, and these videos come without a sound")
            columns |= {"audio": self._sound.clone(), "sample_rate": self._rate}
        others = f" and {len(texts) - 1} more" if len(texts) > 1 else ""
        with told(f"reward {name}", f", given the prompt {texts[0]!r}{others}"):
            try:
                values = reward(given, texts, **columns)
            except UserError as error:
                raise UserError(f"reward {name}: {error}") from error
        if isinstance(given, Tensor) and (given._version != version or self._checksum(given) != self._sums[takes]):
            raise UserError(f"reward {name} changed the videos in place, which others read too; work on a copy")
        return values

    def _form(self, takes: Input) -> Any:
        with self._lock:
            if takes not in self._forms:
                self._forms[takes] = self._make(takes)
                self._sums[takes] = self._checksum(self._forms[takes])
            return self._forms[takes]

    def _checksum(self, form: Any) -> int:
        """Return a number of the values, which a write past autograd's counter (`numpy()`, `.data`) changes too."""
        if not self._several or not isinstance(form, Tensor):
            return 0
        values: Any = np.ascontiguousarray(form.numpy())
        return zlib.crc32(values)

    def _make(self, takes: Input) -> Any:
        if isinstance(takes, LatentVideos):
            assert self._latents is not None
            return self._latents.float().cpu()
        media = self._media
        assert media is not None
        if isinstance(takes, Pixels):
            return media if isinstance(media, list) else takes.prepare(media, self._fps)
        self._folder = tempfile.TemporaryDirectory(prefix="flashgrpo-videos-")
        paths = [Path(self._folder.name) / f"{row:04d}{suffix_of(one)}" for row, one in enumerate(media)]
        for row, (path, one) in enumerate(zip(paths, media, strict=True)):
            write_medium(
                path, with_sound(one, None if self._sound is None else self._sound[row], self._rate), self._fps
            )
        return [str(path) for path in paths]
