"""What a reward server answers, in JSON: the numbers of a request, and at /info what it serves.

    {"id": ..., "reward": "NAME VERSION", "components": {name: [B numbers]}}

The one component of a reward that returns no mapping is called "". What is not exactly so is refused.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flashgrpo.errors import UserError
from flashgrpo.scoring.inputs import Input
from flashgrpo.scoring.loading import checked_values

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
        """Name and version, which tell rewards apart."""
        return f"{self.name} {self.version}"

    @staticmethod
    def read(answer: bytes, url: str) -> "Info":
        """Read what the server at `url` answered.

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
    """Pack an answer into bytes; `reward` tells rewards apart (name and version)."""
    return json.dumps({"id": id, "reward": reward, "components": components}, allow_nan=False).encode()


def unpack_answer(body: bytes, id: str, reward: str, count: int) -> dict[str, list[float]]:
    """Return the components of the answer to request `id`, `count` finite numbers each.

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


def load_json(text: bytes, what: str) -> Any:
    """Read strict JSON in UTF-8: no NaN, no nesting without end.

    Raises:
        ValueError: it is something else.
    """
    try:
        return json.loads(text.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
