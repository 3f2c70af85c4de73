"""What a reward server answers, in JSON: the numbers of a request, and at /info what it serves.

    {"id": ..., "reward": "NAME VERSION", "components": {name: [B numbers]}}

The one component of a reward that returns no mapping is called "". What is not exactly so is refused.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from flashgrpo.errors import UserError
from flashgrpo.inputs import Input
from flashgrpo.rewards.loading import components_of

FORMAT = 1


class Info(BaseModel):
    """What a server says of itself at /info.

    Args:
        format: of requests and answers.
        takes: what its reward looks at.
        score_range: lowest and highest number of the reward, where it says so.
        max_bytes: a request may have.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    format: int
    name: str = Field(max_length=300)
    version: str = Field(max_length=100)
    takes: Annotated[Input, Field(discriminator="kind")]
    score_range: tuple[float | None, float | None] | None = None
    max_bytes: int = Field(gt=0)

    @property
    def reward(self) -> str:
        """What tells rewards apart."""
        return f"{self.name} {self.version}"

    @staticmethod
    def read(answer: bytes, url: str) -> "Info":
        """What the server at `url` answered.

        Raises:
            UserError: it is no reward server, or one of another format.
        """
        try:
            said = load_json(answer, "what it answers")
        except ValueError as error:
            raise UserError(f"{url} is no reward server: {error}") from error
        if isinstance(said, dict) and said.get("format", FORMAT) != FORMAT:
            raise UserError(
                f"{url} speaks format {str(said['format'])[:20]} and this is format {FORMAT}; "
                "install one release of flash-grpo on both sides"
            )
        try:
            return Info.model_validate_json(answer)
        except ValidationError as error:
            raise UserError(f"{url} is no reward server of this release: its /info has other fields") from error


def pack_answer(id: str, reward: str, components: Mapping[str, Sequence[float]]) -> bytes:
    """An answer's bytes; `reward` tells rewards apart (name and version)."""
    return json.dumps({"id": id, "reward": reward, "components": components}, allow_nan=False).encode()


def unpack_answer(body: bytes, id: str, reward: str, count: int) -> dict[str, list[float]]:
    """The components of the answer to request `id`, `count` finite numbers each.

    Raises:
        ValueError: one sentence on whatever is not as it has to be.
    """
    answer = load_json(body, "the answer")
    if not isinstance(answer, dict) or set(answer) != {"id", "reward", "components"}:
        raise ValueError("the answer must have exactly the keys components, id, reward")
    if answer["id"] != id:
        raise ValueError("the answer is to another request")
    if answer["reward"] != reward:
        raise ValueError(f"the answer is of another reward than {reward}")
    if not isinstance(answer["components"], dict):
        raise ValueError("the answer's components must be an object")
    return checked_values(answer["components"], count)


def checked_values(values: Any, count: int) -> dict[str, list[float]]:
    """What a reward returned, or what came back, as component -> `count` finite numbers.

    Raises:
        ValueError: it is something else.
    """
    parts = components_of(values)
    if not parts:
        raise ValueError("there is no component in what was returned")
    checked = {}
    for name, numbers in parts.items():
        label = f"component {name!r}" if name else "the reward"
        column = numbers.detach().to("cpu", torch.float64).tolist() if isinstance(numbers, Tensor) else numbers
        if not isinstance(name, str) or not isinstance(column, Sequence) or isinstance(column, str):
            raise ValueError(f"{label} must be {count} numbers, not {type(numbers).__name__}")
        if len(column) != count:
            raise ValueError(f"{label} has {len(column)} numbers for {count} videos")
        for value in column:
            if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
                raise ValueError(f"{label} must be numbers, not {type(value).__name__}")
        checked[name] = [_finite(value, label) for value in column]
    return checked


def load_json(text: bytes, what: str) -> Any:
    """Strict JSON in UTF-8: no NaN, no nesting without end.

    Raises:
        ValueError: it is something else.
    """
    try:
        return json.loads(text.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON") from error


def _finite(value: Any, label: str) -> float:
    try:
        number = float(value)
    except OverflowError:  # an integer beyond all floats
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{label} is {number} for a video; rewards must be finite")
    return number


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
