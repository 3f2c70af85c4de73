"""A case of the tables in this folder: what is typed, and the one sentence that answers it."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """A command that is refused.

    Example:
        Case("train RECIPE prompts.train=HERE/a.txt", "has no prompts", {"a.txt": "\\n"})

    Args:
        command: what follows `flashgrpo`, in a shell's quotes or as a list. HERE is an empty folder, RECIPE a small
            recipe in it whose `out` is HERE/run, and RUN that folder once its one update is done.
        sentence: a part of the answer that no other mistake gets.
        files: name below HERE -> contents, written before the command; None removes the file. HERE stands in texts too.
        env: environment variables of the command.
        code: the exit code.
        begun: whether the mistake can only be met after the run has begun, so that HERE/run may be there afterwards.
    """

    command: str | Sequence[str]
    sentence: str
    files: Mapping[str, str | bytes | None] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    code: int = 2
    begun: bool = False

    def __str__(self) -> str:
        return self.sentence.strip().replace(" ", "-")[:60] or "empty"

    def arguments(self, here: Path) -> list[str]:
        """Return the command's arguments, with the paths that the capitals stand for."""
        words = shlex.split(self.command) if isinstance(self.command, str) else self.command
        return [_placed(word, here) for word in words]

    def write_files(self, here: Path) -> None:
        """Write the case's own files below `here`."""
        for name, content in self.files.items():
            file = here / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                file.unlink()
            else:
                file.write_bytes(_placed(content, here).encode() if isinstance(content, str) else content)


def _placed(text: str, here: Path) -> str:
    for name, path in (("RECIPE", here / "recipe.yaml"), ("RUN", here / "run"), ("HERE", here)):
        text = text.replace(name, str(path))
    return text
