"""What a streaming video shows when: its prompt, and others from later frames on."""

from dataclasses import dataclass
from typing import Any

from flashgrpo.errors import UserError
from flashgrpo.processes.streaming.window import Window
from flashgrpo.types import Prompt

SWITCHES = "switches"
"""Column of a prompt file: `[{"frame": 45, "prompt": "a red dog"}, ...]`, the video frames at which prompts change."""


@dataclass(frozen=True)
class Scene:
    """Latent frames from `start` on, which are drawn under one prompt."""

    start: int
    prompt: Prompt


def scenes_of(prompt: Prompt, frames: int, window: Window, stride: int) -> list[Scene]:
    """Return the scenes of a prompt, in order; the first begins at frame 0.

    A scene's prompt has what its entry says beside `frame` and `prompt` as columns, in place of the first scene's.

    Args:
        frames: latent frames of the video.
        window: which tells where blocks begin.
        stride: video frames of a latent frame, but for the first, which has one.

    Raises:
        UserError: a switch is no frame and prompt, does not fall on a block's first frame, or is not after the last.
    """
    columns = {name: value for name, value in prompt.columns.items() if name != SWITCHES}
    scenes = [Scene(0, Prompt(prompt.text, columns))]
    for switch in prompt.columns.get(SWITCHES) or ():
        where = f"the prompt {prompt.text!r:.80}, {SWITCHES}"
        frame, text = _frame_and_text(switch, where)
        start = 1 + (frame - 1) // stride
        begins = [block for block in window.starts(frames) if block > scenes[-1].start]
        if frame < 1 or (frame - 1) % stride or start not in begins:
            fits = [1 + (block - 1) * stride for block in begins]
            near = min(fits, key=lambda fit: abs(fit - frame), default=None)
            raise UserError(
                f"{where}: a prompt changes at the first frame of a block and after the one before it, not at frame "
                f"{frame}" + ("; no block is left" if near is None else f"; the nearest is {near}")
            )
        more = {name: value for name, value in switch.items() if name not in ("frame", "prompt")}
        scenes.append(Scene(start, Prompt(text, {**columns, **more})))
    return scenes


def _frame_and_text(switch: Any, where: str) -> tuple[int, str]:
    frame, text = (switch.get(name) for name in ("frame", "prompt")) if isinstance(switch, dict) else (None, None)
    if not isinstance(frame, int) or isinstance(frame, bool) or not isinstance(text, str) or not text.strip():
        raise UserError(f'{where} is a list of {{"frame": number, "prompt": text}}, not of {switch!r:.80}')
    return frame, text


def texts_of(prompt: Prompt) -> list[Prompt]:
    """Return what the network is asked for along a prompt's video, as far as its switches can be read."""
    switches = prompt.columns.get(SWITCHES) or ()
    texts = [_frame_and_text(switch, f"the prompt {prompt.text!r:.80}, {SWITCHES}")[1] for switch in switches]
    return [Prompt(text, {}) for text in (prompt.text, *texts)]
