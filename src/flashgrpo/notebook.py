"""A run as an object: its numbers, and its page where a notebook shows it."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEIGHT = 720  # pixels of the frame


@dataclass(frozen=True)
class Run:
    """A run directory, read anew at each look, so that one of a run that goes on is never old.

    In a notebook it shows itself: result, curves, and samples beside the base, playing (the report, in a frame).

    Example: `run = Run(train(RunConfig.load("tiny", ["updates=4"])))`
    """

    path: str | Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, one an update."""
        return self._read().metrics

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of evaluations.jsonl; the first is the base model's."""
        return self._read().evaluations

    @property
    def result(self) -> Mapping[str, Any] | None:
        """What the run has come to, paired with the base: the best update on other noise, or the best evaluation."""
        return self._read().result

    def samples(self) -> Sequence[Mapping[str, Any]]:
        """Return the samples of the result: prompt, rewards of both models, and the files that were kept."""
        return list((self.result or {}).get("samples", []))

    def _read(self) -> Any:
        from flashgrpo.report.record import read_run  # brings numpy and more, which `import flashgrpo` does without

        return read_run(Path(self.path))

    def _repr_html_(self) -> str:
        from flashgrpo.errors import UserError
        from flashgrpo.report import render

        try:
            page = render(self._read())
        except UserError as error:  # there is none yet
            return f"<p>{html.escape(str(error))}</p>"
        title = html.escape(str(self.path))
        style = f"width: 100%; height: {HEIGHT}px; border: 1px solid #8888; border-radius: 6px"
        return f'<iframe title="{title}" style="{style}" srcdoc="{html.escape(page)}"></iframe>'
