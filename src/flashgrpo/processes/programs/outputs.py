"""What runs come to, as rows of bytes: so that outputs are cut, kept and handed over like those of any process.

A row is a flag, 8 bytes that name the random numbers of an environment, and the text in UTF-8, filled up with zeros.
"""

from collections.abc import Sequence

import torch
from jaxtyping import UInt8
from torch import Tensor

from flashgrpo.processes.programs.runs import Answer
from flashgrpo.seeds import Name, keyed_bits

HEAD = 9
LONGEST = 4_000  # bytes of a text; what is longer has failed
Rows = UInt8[Tensor, "batch bytes"]


def to_row(answer: Answer, name: Name) -> UInt8[Tensor, " bytes"]:
    """Write an answer; `name` is that of its environment's random numbers."""
    text = answer.text.encode("utf-8", "replace").replace(b"\0", b"")
    failed = answer.failure is not None or len(text) > LONGEST
    head = bytes([failed]) + keyed_bits(*name).to_bytes(8, "little")
    return torch.frombuffer(
        bytearray((head + (b"" if failed else text)).ljust(HEAD + LONGEST, b"\0")), dtype=torch.uint8
    )


def stacked(rows: Sequence[Tensor], device: torch.device) -> Rows:
    """Join rows; none of them where there are none."""
    none = torch.empty(0, HEAD + LONGEST, dtype=torch.uint8)
    return (torch.stack(list(rows)) if rows else none).to(device)


def texts_of(rows: Rows) -> list[str | None]:
    """Return the texts, None of what has failed."""
    found = [bytes(row.tolist()) for row in rows.cpu()]
    return [None if row[0] else row[HEAD:].rstrip(b"\0").decode("utf-8") for row in found]


def names_of(rows: Rows) -> list[int]:
    """Return the number that names the random numbers of each row's environment."""
    return [int.from_bytes(bytes(row[1:HEAD].tolist()), "little") for row in rows.cpu()]
