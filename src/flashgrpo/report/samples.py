"""The samples of a run that its page shows: pairs, and films of the first prompts."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from flashgrpo.media import NOUNS
from flashgrpo.report import findings
from flashgrpo.report.record import Row, Run, samples_of

MOST_PAIRS = 12
MOST_STRIPS = 4
MOST_MEDIA_BYTES = 24 * 2**20  # of all embedded samples together
CAPTIONS = ("base", "base_caption"), ("tuned", "caption")  # what a model wrote for a video to be made of
URIS = {".mp4": "data:video/mp4;base64,", ".png": "data:image/png;base64,"}


class Media(NamedTuple):
    """The files of a run's samples, as they stand in its page: embedded, or as links into the run directory."""

    run: Path
    linked: bool

    def content(self, name: object) -> str | None:
        """Return a data URI, a link, or a text itself; None where the file is not one that is shown."""
        data = file_bytes(self.run, name)
        uri = URIS.get(Path(str(name)).suffix)
        if data is None or uri is None:
            return None if data is None else data.decode("utf-8", "replace")
        return quote(str(name)) if self.linked else uri + base64.b64encode(data).decode("ascii")


class Pairs(NamedTuple):
    """Pairs of one evaluation, in the order of the prompts' file and those that changed most, the worst first."""

    plain: list[dict[str, Any]]
    extremes: list[dict[str, Any]]
    update: int = 0
    note: str = ""  # a sentence where some are left out


def shown_pairs(run: Run, shown: Row | None, media: Media) -> Pairs:
    """Pairs of the evaluation that is shown, or else of the latest that has any."""
    for evaluation in filter(None, [shown, *reversed(run.evaluations)]):
        samples = samples_of(evaluation)
        rows = [row for row in evaluation.get("extremes", []) if row in range(len(samples))]
        changed = [sample for row in rows if is_pair(sample := samples[row])]
        both = unselected_pairs(evaluation)
        ends, left = embedded(media, changed, MOST_MEDIA_BYTES // 2)
        plain, _ = embedded(media, both[:MOST_PAIRS], left + MOST_MEDIA_BYTES // 2)
        if plain or ends:
            note = f"{len(plain)} of {len(both)} pairs are shown." if len(plain) < len(both) else ""
            return Pairs(plain, ends, evaluation["update"], note)
    return Pairs([], [])


def unselected_pairs(evaluation: Row) -> list[Row]:
    """Return the samples that were kept beside the base's without a look at their rewards."""
    samples = samples_of(evaluation)
    return [s for s in samples if is_pair(s) and not Path(str(s["base_video"])).stem.endswith("-base")]


def is_pair(sample: Row) -> bool:
    return bool(sample.get("video") and sample.get("base_video"))


def embedded(media: Media, samples: Sequence[Row], left: int) -> tuple[list[dict[str, Any]], int]:
    """Return the pairs that fit into `left` bytes, and the bytes that are left over."""
    pairs = []
    for sample in samples:
        base, tuned = (media.content(sample[key]) for key in ("base_video", "video"))
        if base is not None and tuned is not None and len(base) + len(tuned) <= left:
            left -= len(base) + len(tuned)
            pairs.append(shown_pair(sample, base, tuned))
    return pairs, left


def shown_pair(sample: Row, base: str, tuned: str) -> dict[str, Any]:
    return {
        "prompt": str(sample.get("prompt", "")),
        "kind": NOUNS[Path(str(sample["video"])).suffix],
        "base": base,
        "tuned": tuned,
        "base_reward": sample.get("base_reward"),
        "reward": sample.get("reward"),
        "components": findings.components(sample),
        "scenes": scenes(sample),
        "captions": [(of, sample[key]) for of, key in CAPTIONS if isinstance(sample.get(key), str)],
    }


def filmstrips(run: Run, media: Media) -> list[dict[str, Any]]:
    """Return a row for each of the first prompts: what the same noise became at each evaluation that kept it."""
    rows: dict[str, list[dict[str, Any]]] = {}
    left = MOST_MEDIA_BYTES // 2
    of_row = zip(*(samples_of(evaluation) for evaluation in run.evaluations), strict=False)
    for samples in of_row:
        prompt = str(samples[0].get("prompt", ""))
        kept = [pair for pair in zip(run.evaluations, samples, strict=True) if pair[1].get("video")]
        if prompt in rows or len(rows) == MOST_STRIPS or len(kept) < 2:
            continue
        shown = [film_frame(evaluation, sample, media) for evaluation, sample in kept]
        frames = [frame for frame in shown if frame["content"] is not None]
        left -= sum(len(frame["content"]) for frame in frames)
        if left < 0:
            break
        if len(frames) > 1:
            rows[prompt] = frames
    return [{"prompt": prompt, "frames": frames} for prompt, frames in rows.items()]


def film_frame(evaluation: Row, sample: Row, media: Media) -> dict[str, Any]:
    kind = NOUNS.get(Path(str(sample["video"])).suffix, "")
    shown = {"prompt": str(sample.get("prompt", "")), "kind": kind, "content": media.content(sample["video"])}
    return {"after": evaluation["update"], "reward": sample.get("reward"), **shown}


def scenes(sample: Row) -> list[dict[str, Any]]:
    """Return where the prompts of a video begin, in percent of it; nothing where it has one."""
    told = sample.get("scenes")
    rows = [row for row in told if isinstance(row, dict)] if isinstance(told, list) else []
    shares = [row for row in rows if isinstance(row.get("share"), int | float) and 0 <= row["share"] <= 1]
    return [{"at": 100 * row["share"], "frame": row.get("frame"), "prompt": str(row.get("prompt"))} for row in shares]


def file_bytes(run: Path, name: object) -> bytes | None:
    """Return the file, where it is one inside the run directory, of a kind that is shown, and small enough to embed."""
    path = (run / str(name)).resolve()
    inside = path.is_relative_to(run.resolve()) and path.is_file() and path.suffix in NOUNS
    return path.read_bytes() if inside and path.stat().st_size <= MOST_MEDIA_BYTES else None
