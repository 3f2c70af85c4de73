"""What trainer and reward server say to each other in JSON: of a request, in an answer, and at /info.

Pydantic reads it strictly, so what is passed on has these types, and no text holds half a character.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from flashgrpo.errors import UserError, printable
from flashgrpo.jsontext import to_json
from flashgrpo.scoring.inputs import Input
from flashgrpo.scoring.loading import checked_values

FORMAT = 2
Kind = Literal["pixels", "latents", "files"]
Encoding = Literal["uint8", "float32", "mp4"]
ENCODINGS: Mapping[str, tuple[str, ...]] = {"pixels": get_args(Encoding), "latents": ("float32",), "files": ("mp4",)}
Shown = Annotated[str, Field(max_length=300), AfterValidator(printable)]
M = TypeVar("M", bound=BaseModel)


class About(BaseModel):
    """What a request says of its B videos.

    Args:
        shape: of one video whose encoding is mp4, (F, 3, H, W); empty otherwise.
        sizes: bytes of each mp4 file; empty otherwise.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    id: str = Field(pattern=r"^[0-9a-z-]{1,64}$")
    kind: Kind
    encoding: Encoding
    prompts: list[str] = Field(min_length=1)
    columns: dict[str, list[Any]]
    shape: list[PositiveInt]
    sizes: list[PositiveInt]


class Answer(BaseModel):
    """The numbers of request `id`, from the reward "NAME VERSION"; the one component without a name is called ""."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str
    reward: str
    components: dict[str, Any]


class Info(BaseModel):
    """What a server says of itself at /info.

    Args:
        format: of requests and answers.
        takes: what its reward looks at.
        score_range: lowest and highest number of the reward, where it says so.
        max_bytes: that a request may have, as it is sent and as uint8.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    format: int
    name: Shown
    version: Shown
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
        spoken: Any = FORMAT
        with contextlib.suppress(ValueError, RecursionError, TypeError, LookupError):
            spoken = json.loads(answer)["format"]
        if spoken != FORMAT:
            raise UserError(
                f"{url} speaks format {printable(str(spoken), 20)} and this is format {FORMAT}; "
                "install one release of flash-grpo on both sides"
            )
        try:
            return read_json(Info, answer, "/info")
        except ValueError as error:
            raise UserError(f"{url} is no reward server of this release: {error}") from error


def pack_answer(id: str, reward: str, components: Mapping[str, Sequence[float]]) -> bytes:
    """Pack an answer into bytes; `reward` tells rewards apart (name and version). What is not finite is null."""
    return to_json({"id": id, "reward": reward, "components": components}).encode()


def unpack_answer(body: bytes, id: str, reward: str, count: int) -> dict[str, list[float]]:
    """Return the components of the answer to request `id`, `count` numbers each, NaN for null.

    Raises:
        ValueError: one sentence on whatever is not as it has to be.
    """
    answer = read_json(Answer, body, "the answer")
    if answer.id != id:
        raise ValueError("the answer is to another request")
    if answer.reward != reward:
        raise ValueError(f"the answer is of another reward than {reward}")
    if any(name != printable(name, 100) for name in answer.components):
        raise ValueError("the answer has a component whose name is no short line of text")
    return checked_values(answer.components, count)


def read_json(model: type[M], text: bytes, what: str) -> M:
    """Read strict JSON.

    Raises:
        ValueError: it is something else; one sentence names the field.
    """
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(printable(f"{what}{', ' * bool(place)}{place}: {first['msg']}")) from error
