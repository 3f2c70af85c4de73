"""Odd values for every setting of the schema: each is taken, or refused in one sentence; every number has bounds."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from flashgrpo.config import RunConfig, recipe_schema
from flashgrpo.errors import UserError
from flashgrpo.settings import LARGEST, SMALLEST

WORDS = (
    "'' a null ~ true no .nan .inf -.inf [] {} [1,2,3] {a:1} {kind:x} {kind:[]} [[]] {1:2} !env>A !x *a &a>1 a:>b: [/b]"
)
NUMBERS = "0 -0.0 -1 1 2 1.5 1e-300 5e-324 1e300 -1e300 1e12 1000001 -1000001 0x1F 0o17 1_000 1:30 9223372036854775808"
TEXTS = [
    "\t",
    "\n",
    "\0",
    "%d",
    "${a}",
    "flashgrpo:",
    "http://",
    "x" * 300,
    "/" * 5000,
    "\u202e\ud83d",
    "\udcff",
    " a ",
]
VALUES = [*(value.replace(">", " ") for value in f"{WORDS} {NUMBERS}".split()), *TEXTS, "1" * 400, "1" * 5000, "[" * 99]

Node = Mapping[str, Any]


def settings_below(node: Node, keys: tuple[str, ...] = (), given: tuple[str, ...] = ()) -> Iterator[tuple]:
    """Yield the keys of each setting, what has to be given for it to exist, and the types that it may have."""
    if "$ref" in node:
        yield from settings_below(recipe_schema()["$defs"][node["$ref"].rsplit("/", 1)[-1]], keys, given)
    for choice in node.get("anyOf", node.get("oneOf", ())):
        yield from settings_below(choice, keys, given)
    kind = node.get("properties", {}).get("kind", {}).get("const")
    given = (*given, f"{'.'.join(keys)}.kind={kind}") if kind else given
    for name, below in node.get("properties", {}).items():
        yield from settings_below(below, (*keys, name), given)
    if isinstance(below := node.get("additionalProperties"), Mapping):
        yield from settings_below(below, (*keys, "mine"), (*given, f"{'.'.join(keys)}.mine.call=jpeg:compressibility"))
    if keys and node.get("properties") is None and "$ref" not in node:
        yield keys, given, {node.get("type")} | {entry.get("type") for entry in node.get("prefixItems", ())}


SETTINGS = list(dict.fromkeys((".".join(keys), given) for keys, given, _ in settings_below(recipe_schema())))
NUMERIC = {
    (".".join(keys), given): "array" in types
    for keys, given, types in settings_below(recipe_schema())
    if types & {"number", "integer"} and keys[-1] != "seed"
}
SHARES = 16  # of which `make test` has one, with every value and every setting in it


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The fewest lines that are a run."""
    file = tmp_path_factory.mktemp("odd") / "recipe.yaml"
    file.write_text(
        "{out: run, updates: 9, optim: {ema: {every: 1}}, prompts: {train: a.txt, heldout: b.txt},"
        "model: {path: 'flashgrpo:tiny/weights', height: 32, width: 32, num_frames: 1},"
        "rewards: {agreement: {call: 'flashgrpo.rewards.shapes:agreement'}}}"
    )
    return file


def refusal(recipe: Path, *overrides: str) -> str:
    """Return the sentence that refuses settings, or nothing where they are taken; whatever else is raised is a bug."""
    told = ""
    try:
        RunConfig.load(recipe, overrides).to_yaml()
    except UserError as error:
        told = str(error)
    assert all(10 < len(line) < 800 and line.isprintable() for line in told.split("\n") if told), told
    return told


@pytest.mark.parametrize("share", range(SHARES), ids=lambda share: f"slow-{share}" if share else "fast")
def test_an_odd_value_is_taken_or_refused_in_one_sentence(recipe, share):
    for number, (key, given) in enumerate(SETTINGS):
        for value in VALUES[(number + share) % SHARES :: SHARES]:
            refusal(recipe, *given, f"{key}={value}")


def test_every_number_is_of_a_size_that_float32_calculates_with(recipe):
    """Above LARGEST nothing is taken, and close to 0 only where 0 itself is."""
    for (key, given), pair in NUMERIC.items():
        large, small, zero = (
            [refusal(recipe, *given, f"{key}={[value, value] if pair else value}") for value in values]
            for values in ((2 * LARGEST, -2 * LARGEST), (SMALLEST / 2, -SMALLEST / 2), (0,))
        )
        assert all(large), (key, given)
        assert all(small) or not any(zero), (key, given)


def test_the_walk_finds_the_settings_of_every_choice():
    assert len(SETTINGS) > 200
    assert ("algorithm.objective.tau", ("algorithm.objective.kind=kl-masked",)) in SETTINGS
    assert {"optim.betas", "rewards.mine.weight", "rollout.guidance_scale_2"} <= {key for key, _ in NUMERIC}
