"""What ranks tell each other: JSON as bytes, and either a value or the sentence of a `UserError`."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flashgrpo.errors import SharedError, UserError


def outcome_of(compute: Callable[[], Any]) -> dict[str, Any]:
    """Return what was computed, or what a `UserError` says."""
    try:
        return {"value": compute()}
    except UserError as error:
        return {"error": str(error)}


def values_of(outcomes: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the values of all outcomes.

    Raises:
        SharedError: one is an error.
    """
    for one in outcomes:
        if "error" in one:
            raise SharedError(one["error"])
    return [one["value"] for one in outcomes]


def to_bytes(value: Any) -> Tensor:
    """Write a JSON value as bytes, (N,) uint8."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def from_bytes(message: Tensor) -> Any:
    """Read what `to_bytes` has written."""
    return json.loads(message.numpy().tobytes())


def through_json(value: Any) -> Any:
    """Return a value as another rank would read it: what cannot be told to a rank fails on a single one too."""
    return json.loads(json.dumps(value))
