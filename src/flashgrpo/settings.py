"""What the settings of every part have in common. Each part keeps its own beside what they set, free of torch."""

from pydantic import BaseModel, ConfigDict

FORBID_EXTRA = {"extra": "forbid"}
"""Of a dataclass that is a setting and the component at once (`__pydantic_config__`): an unknown key is an error."""


class Part(BaseModel):
    """Settings are immutable and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
