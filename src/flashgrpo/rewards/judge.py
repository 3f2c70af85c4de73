"""A judge behind an OpenAI-compatible chat endpoint: a vision-language model that is asked for a score in words.

vLLM, SGLang, llama.cpp and the large providers speak this protocol, so UnifiedReward and any other model that takes
images is a recipe away:

    judge:
      call: "flashgrpo.rewards.judge:Judge"
      args:
        url: "http://127.0.0.1:8000/v1"
        model: "CodeGoat24/UnifiedReward-qwen-7b"
        template: "These frames are of one video. Caption: {prompt}. Rate how well it fits ... Final Score: <1 to 5>"
        pattern: "Final Score: *([0-9.]+)"
        score_range: [1, 5]
"""

import asyncio
import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from flashgrpo.errors import UserError, first_line, suggest
from flashgrpo.rewards.frames import pick
from flashgrpo.scoring.inputs import Pixels
from flashgrpo.scoring.loading import as_float
from flashgrpo.serving.http import Endpoint, Transient, all_of, persist, run
from flashgrpo.video import to_pictures

ADVICE = "is the judge's server running there, and can this machine reach it?"
JSON = {"Content-Type": "application/json"}
AGAIN = "That is not an answer of the form that was asked for. Answer again, in exactly that form."


class Judge:
    """Shows a model some frames and a text, and reads a number out of its answer; higher is better.

    Args:
        url: of the API, with its version: http://host:port/v1.
        model: its name there.
        template: the text; {prompt} and {COLUMN} stand for the prompt and the prompt file's columns.
        score_range: the lowest and the highest number that counts as an answer.
        pattern: a regular expression whose one group is the number; it must say one number throughout the answer.
        key: or a key of the JSON object that the answer is to be.
        frames: shown, spread evenly over the video.
        size: pixels of the shorter side that they are reduced to.
        image: jpeg or png.
        max_tokens: of an answer.
        attempts: how often a video's answer that cannot be read is asked for anew, the first time included.
        concurrency: requests at a time.
        timeout: seconds that one request may take.
        patience: seconds for which failures of the server are repeated.
        token_env: environment variable with the API key, FLASHGRPO_...; by default FLASHGRPO_JUDGE_TOKEN, if set.

    Raises:
        UserError: arguments that do not fit together.
    """

    def __init__(
        self,
        url: str,
        model: str,
        template: str,
        score_range: Sequence[float | int],
        *,
        pattern: str | None = None,
        key: str | None = None,
        frames: int = 4,
        size: int = 448,
        image: str = "jpeg",
        max_tokens: int = 512,
        attempts: int = 3,
        concurrency: int = 8,
        timeout: float | int = 120.0,  # a recipe may well say 120
        patience: float | int = 600.0,
        token_env: str | None = None,
    ) -> None:
        if (pattern is None) == (key is None):
            raise UserError("a judge's answer is read by a pattern or by a key: give one of the two")
        if image not in ("jpeg", "png"):
            raise UserError(f"image: {suggest(image, ('jpeg', 'png'))}, not {image!r}")
        if min(frames, size, max_tokens, attempts, concurrency) < 1 or timeout <= 0 or patience < 0:
            raise UserError(
                "a judge's frames, size, max_tokens, attempts and concurrency are 1 or more, timeout above 0"
            )
        if len(score_range) != 2 or not -math.inf < score_range[0] < score_range[1] < math.inf:
            raise UserError(f"score_range must be a lowest and a highest number, not {list(score_range)}")
        self._endpoint = Endpoint(url, token_env, "FLASHGRPO_JUDGE_TOKEN", float(timeout))
        self._model, self._template, self._image = model, template, image
        self._pattern, self._key = _compiled(pattern), key
        self._frames, self._max_tokens, self._attempts = frames, max_tokens, attempts
        self._concurrency, self._patience = concurrency, float(patience)
        self.score_range = (float(score_range[0]), float(score_range[1]))
        self.takes = Pixels(size=size)
        self.failures = 0  # attempts that failed or could not be read, and were repeated

    def __call__(self, videos: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        """Score videos (B, F, 3, H, W) in [0, 1].

        Raises:
            UserError: the server refuses or stays away, or the judge gives no answer of the form asked for.
        """
        rows = [{"prompt": prompt} for prompt in prompts]
        for name, column in columns.items():
            for row, value in zip(rows, column, strict=True):
                row.setdefault(name, value)
        return run(self._judge(videos, [self._text(row) for row in rows]))

    async def _judge(self, videos: Tensor, texts: Sequence[str]) -> list[float]:
        slots = asyncio.Semaphore(self._concurrency)

        async def judged(video: Tensor, text: str) -> float:
            async with slots:
                return await self._one(client, video, text)

        async with self._endpoint.client() as client:
            return await all_of([judged(video, text) for video, text in zip(videos, texts, strict=True)])

    async def _one(self, client: httpx.AsyncClient, video: Tensor, text: str) -> float:
        pictures = await asyncio.to_thread(self._pictures, video)
        content = [{"type": "image_url", "image_url": {"url": picture}} for picture in pictures]
        messages: list[dict[str, Any]] = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
        answer = ""
        for _ in range(self._attempts):
            answer = await self._chat(client, messages)
            score = self.read(answer)
            if score is not None:
                return score
            self.failures += 1
            # At temperature 0 the same question has the same answer, so it is told what was wrong with it.
            messages = [messages[0], {"role": "assistant", "content": answer}, {"role": "user", "content": AGAIN}]
        wanted = f"the pattern {self._pattern.pattern!r}" if self._pattern else f"a JSON object with {self._key!r}"
        low, high = self.score_range
        raise UserError(
            f"the judge {self._model} gave no score in {self._attempts} attempts: its answer must match {wanted}, a "
            f"number from {low:g} to {high:g}, and it said {' '.join(answer.split())[-200:]!r}"
        )

    async def _chat(self, client: httpx.AsyncClient, messages: Sequence[Mapping[str, Any]]) -> str:
        asked = {"model": self._model, "messages": messages, "temperature": 0, "max_tokens": self._max_tokens}
        body = json.dumps(asked).encode()

        async def ask() -> bytes:
            try:
                return await self._endpoint.ask(client, "POST", "/chat/completions", [body], JSON)
            except Transient:
                self.failures += 1
                raise

        answer = await persist(ask, self._patience, ADVICE)
        try:
            content = json.loads(answer)["choices"][0]["message"]["content"]
        except (ValueError, RecursionError, TypeError, LookupError) as error:
            raise UserError(f"{self._endpoint.url} gave no chat completion; is this the URL of an API?") from error
        return content if isinstance(content, str) else ""

    def read(self, answer: str) -> float | None:
        """Return the score that an answer says, or None where it says none, several, or one out of range."""
        if self._pattern is not None:
            said = set(self._pattern.findall(answer))
            values = [_number(text) for text in said]
        else:
            fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", answer, re.DOTALL)
            try:
                told = json.loads(fenced[1] if fenced else answer)
            except (ValueError, RecursionError):
                return None
            values = [_number(told.get(self._key))] if isinstance(told, dict) else []
        low, high = self.score_range
        if len(set(values)) != 1 or values[0] is None or not low <= values[0] <= high:
            return None
        return values[0]

    def _text(self, row: Mapping[str, Any]) -> str:
        def filled(match: re.Match[str]) -> str:
            if match[1] not in row:
                raise UserError(f"the judge's template has {match[0]}; {suggest(match[1], row)}")
            return str(row[match[1]])

        return re.sub(r"\{(\w+)\}", filled, self._template)  # once, so that no prompt is taken for a template

    def _pictures(self, video: Float[Tensor, "frames 3 height width"]) -> list[str]:
        """Return the frames shown, as data URLs."""
        pixels = self.takes.prepare(pick(video, self._frames)[None], fps=1.0)[0]
        urls = []
        for frame in to_pictures(pixels):
            file = io.BytesIO()
            Image.fromarray(frame).save(file, self._image, **({"quality": 90} if self._image == "jpeg" else {}))
            urls.append(f"data:image/{self._image};base64,{base64.b64encode(file.getvalue()).decode()}")
        return urls


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"pattern: {pattern!r} is no regular expression: {first_line(error)}") from error
    if compiled.groups != 1:
        raise UserError(f"pattern: {pattern!r} must have one group, the number, not {compiled.groups}")
    return compiled


def _number(value: Any) -> float | None:
    """Return a number, or its decimal digits in a text."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+(\.\d*)?\s*", value, re.ASCII):
        return float(value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return as_float(value) if number else None
