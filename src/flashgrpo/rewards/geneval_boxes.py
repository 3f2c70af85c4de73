"""GenEval's checks of composition (arXiv 2310.11513): objects, counts, colours and positions, on boxes of OWLv2.

The rules are GenEval's own; the detector is not. GenEval detects the 80 classes of COCO with Mask2Former, whose code is
not transformers', and colours what its masks cut out. Here an open-vocabulary detector is asked for the classes of the
prompt, and colours are those of whole boxes. So its numbers are not those that are published, and it has a name of its
own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flashgrpo.distributed.world import current_device
from flashgrpo.errors import UserError, first_line
from flashgrpo.models.weights import load_network
from flashgrpo.rewards.clip import Clip
from flashgrpo.rewards.frames import pick
from flashgrpo.types import Videos
from flashgrpo.video import to_pictures

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
RELATIONS = ("left of", "right of", "above", "below")
MOST = 16  # boxes of a class
MARGIN = 0.1  # of both objects' sides, by which centres have to be apart
COUNTING = "counting"
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True)
class Thresholds:
    """What counts as an object.

    Args:
        score: that a box needs; `counting` in prompts with the tag counting, where GenEval asks for more.
        overlap: intersection over union from which a weaker box of the same class is the same object.
    """

    score: float
    counting: float
    overlap: float


class GenevalBoxes:
    """1 where a frame shows what the prompt's metadata say, else 0; mean over frames.

    The prompt file is GenEval's `evaluation_metadata.jsonl`, or one like it: columns `include`, a list of
    `{"class": "dog", "count": 2, "color": "red", "position": ["left of", 0]}` (of which colour and position may be
    missing; a position is relative to an earlier entry, by its number), `exclude` with classes and the counts that must
    not be reached, and `tag`.

    Args:
        path: an OWLv2 checkpoint, folder or hub id.
        clip: a CLIP checkpoint, which tells colours.
        frames: looked at, spread evenly over the video; of one, the first.
        threshold: score of a box that counts; counting_threshold: for prompts with the tag `counting`. They are OWLv2's
            and not GenEval's 0.3 and 0.9, which are for Mask2Former; nobody has tuned them: look at pictures of yours.
        max_overlap: intersection over union from which two boxes of a class are one object; OWLv2 gives several boxes
            for an object, where Mask2Former gives one.
        partial: return the share of what is asked for that is there, instead of all or nothing.

    Returns:
        (B,) in [0, 1]. Gamed by pictures of nothing but the objects, in flat colours; it sees neither beauty nor sense.

    Raises:
        UserError: a checkpoint is not there, or is another.
    """

    score_range = (0.0, 1.0)

    def __init__(
        self,
        path: str = "google/owlv2-base-patch16-ensemble",
        clip: str = "openai/clip-vit-large-patch14",
        frames: int = 1,
        threshold: float = 0.2,
        counting_threshold: float = 0.3,
        max_overlap: float = 0.5,
        partial: bool = False,
    ) -> None:
        from transformers import Owlv2ForObjectDetection, Owlv2Processor

        detector: Any = load_network(Owlv2ForObjectDetection, path, f"the OWLv2 model {path}")
        try:
            self._prepare = Owlv2Processor.from_pretrained(path)
        except Exception as error:  # of kinds of transformers, tokenizers and the hub's client
            raise UserError(f"the processor of {path} could not be loaded: {first_line(error)[:200]}") from error
        self._detector = detector.eval().requires_grad_(False).to(current_device())
        self._clip = Clip(clip, clip, frames)
        self._frames, self._partial = frames, partial
        self._thresholds = Thresholds(threshold, counting_threshold, max_overlap)

    def __call__(
        self,
        videos: Videos,
        prompts: list[str],
        include: Sequence[Any],
        exclude: Sequence[Any] | None = None,
        tag: Sequence[Any] | None = None,
        **columns: Any,
    ) -> Tensor:
        """Score the videos.

        Raises:
            ValueError: a prompt's metadata are not GenEval's.
        """
        scores = []
        for row, video in enumerate(videos):
            wanted = clauses(include[row], f"include of {prompts[row]!r}", required=True)
            unwanted = clauses(exclude[row] if exclude else None, f"exclude of {prompts[row]!r}")
            names = list(dict.fromkeys(clause["class"] for clause in (*wanted, *unwanted)))
            counting = tag is not None and tag[row] == COUNTING
            found = [
                self._checks(frame, names, wanted, unwanted, counting)
                for frame in to_pictures(pick(video, self._frames))
            ]
            shares = [sum(checks) / len(checks) if self._partial else float(all(checks)) for checks in found]
            scores.append(sum(shares) / len(shares))
        return torch.tensor(scores)

    def _checks(
        self, picture: Any, names: Sequence[str], wanted: Sequence[Any], unwanted: Sequence[Any], counting: bool
    ) -> list[bool]:
        image = Image.fromarray(picture)
        objects = self._detected(image, names, counting)
        return checks(objects, wanted, unwanted, lambda name, boxes: self._colors(image, name, boxes))

    @torch.no_grad()
    def _detected(self, image: Image.Image, names: Sequence[str], counting: bool) -> dict[str, list[Box]]:
        """Return the boxes of each class, the surest first, after non-maximum suppression."""
        texts = [[f"a photo of a {name}" for name in names]]
        inputs = self._prepare(text=texts, images=image, return_tensors="pt").to(self._detector.device)
        least = self._thresholds.counting if counting else self._thresholds.score
        [found] = self._prepare.post_process_grounded_object_detection(
            self._detector(**inputs), threshold=least, target_sizes=[(image.height, image.width)]
        )
        boxes: dict[str, list[Box]] = {name: [] for name in names}
        for index in found["scores"].argsort(descending=True).tolist():
            left, top, right, bottom = found["boxes"][index].tolist()
            boxes[names[int(found["labels"][index])]].append((left, top, right, bottom))
        return {name: suppressed(own[:MOST], self._thresholds.overlap) for name, own in boxes.items()}

    def _colors(self, image: Image.Image, name: str, boxes: Sequence[Box]) -> list[str]:
        """Return the colour of what is in each box, the nearest to the mean embedding of its templates."""
        texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
        colors = self._clip.texts(texts).unflatten(0, (len(COLORS), len(TEMPLATES))).mean(dim=1)
        colors = torch.nn.functional.normalize(colors, dim=-1)
        cut = self._clip.pictures([image.crop(within(box, image.size)) for box in boxes])
        return [COLORS[index] for index in (cut @ colors.T).argmax(dim=-1).tolist()]


def checks(
    objects: Mapping[str, Sequence[Box]], wanted: Sequence[Any], unwanted: Sequence[Any], colors: Any
) -> list[bool]:
    """Return what holds of all that is asked for: a number for each entry, colour and position, and each exclusion.

    As GenEval: of a class the surest `count` boxes are looked at; enough of them have the colour; each of them stands
    in the relation to each of the target's. What is missing has neither colour nor place.

    Args:
        objects: class -> boxes, the surest first.
        colors: (class, boxes) -> their colours.
    """
    held: list[bool] = []
    groups: list[Sequence[Box] | None] = []
    for clause in wanted:
        found = list(objects.get(clause["class"], ()))[: clause["count"]]
        own = [len(found) == clause["count"]]
        if "color" in clause:
            own.append(own[0] and colors(clause["class"], found).count(clause["color"]) >= clause["count"])
        if "position" in clause:
            relation, target = clause["position"]
            others = groups[target]
            placed = all(own) and others is not None
            own.append(placed and all(relation in relations(a, b) for a in found for b in others or ()))
        groups.append(found if all(own) else None)
        held += own
    return held + [len(objects.get(clause["class"], ())) < clause["count"] for clause in unwanted]


def relations(a: Box, b: Box) -> set[str]:
    """Return how a lies to b, by their centres: of what is left after a margin of their sizes, more than half a length.

    `relations((0, 0, 10, 10), (40, 0, 50, 10)) = {"left of"}`: 40 apart, 38 after the margin of 0.1 (10 + 10).
    """
    apart = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    left = [max(abs(d) - MARGIN * size, 0.0) * (1 if d > 0 else -1) for d, size in zip(apart, sizes, strict=True)]
    length = sum(d * d for d in apart) ** 0.5
    if max(abs(d) for d in left) < 1e-3:
        return set()
    dx, dy = (d / length for d in left)
    return {name for name, holds in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True) if holds}


def suppressed(boxes: Sequence[Box], overlap: float) -> list[Box]:
    """Return the boxes without those that overlap a surer one, which come first."""
    kept: list[Box] = []
    for box in boxes:
        if all(intersection_over_union(box, other) < overlap for other in kept):
            kept.append(box)
    return kept


def intersection_over_union(a: Box, b: Box) -> float:
    """Return the shared part of two boxes, whose last pixels count as inside."""
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    whole = _area(a) + _area(b) - shared
    return shared / whole if whole else 0.0


def _area(box: Box) -> float:
    return max(box[2] - box[0] + 1, 0.0) * max(box[3] - box[1] + 1, 0.0)


def within(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return whole pixels of a box inside of a picture, one at least."""
    (width, height), (left, top, right, bottom) = size, (round(value) for value in box)
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    return left, top, min(max(right, left + 1), width), min(max(bottom, top + 1), height)


def clauses(given: Any, where: str, required: bool = False) -> list[dict[str, Any]]:
    """Return the entries of a column of GenEval's metadata.

    Raises:
        ValueError: they are something else.
    """
    if given is None and not required:
        return []
    entries = [dict(one) if isinstance(one, Mapping) else {} for one in given] if isinstance(given, list) else []
    for number, one in enumerate(entries):
        place = one.get("position")
        one_of = isinstance(place, Sequence) and len(place) == 2 and place[0] in RELATIONS
        if place is not None and not (one_of and place[1] in range(number)):
            raise ValueError(
                f"{where}: position {place!r} must be [relation, number of an earlier entry], the relation one of "
                f"{', '.join(RELATIONS)}"
            )
        if one.get("color") not in (None, *COLORS):
            raise ValueError(f"{where}: color {one['color']!r} must be one of {', '.join(COLORS)}")
    if (required and not entries) or not all(
        isinstance(one.get("class"), str) and _whole(one.get("count")) for one in entries
    ):
        raise ValueError(f'{where} must be a list of GenEval\'s entries, such as {{"class": "dog", "count": 2}}')
    return [{name: value for name, value in one.items() if value is not None} for one in entries]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
