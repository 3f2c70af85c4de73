import os
import tempfile

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would reach for a hub is a mistake
os.environ["FLASHGRPO_CACHE"] = tempfile.mkdtemp(prefix="flashgrpo-test-")  # not the user's; jobs inherit it

from pathlib import Path

import jaxtyping
import pytest
import torch

from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import single_process
from flashgrpo.models.load import load_model
from flashgrpo.presets import PRESETS
from flashgrpo.processes.flow.choices import FLOW
from flashgrpo.processes.flow.model import VideoModel
from tests.nursery import Nursery

torch.set_num_threads(1)  # many short operations: two threads mostly wait for each other, far longer on a busy machine


EXACT = (  # the bundled recipe without its shortcuts
    "rollout.solver.kind=euler",
    "rollout.deterministic_steps=null",
    "rollout.guidance_interval=[0,1]",
    "model.vae_dtype=float32",
)


def small_run(out: Path, *overrides: str) -> RunConfig:
    """The bundled run in very small: two groups of two samples, four steps, two held-out prompts."""
    folder = out.parent / "prompts"
    folder.mkdir(exist_ok=True)
    heldout = folder / "heldout.jsonl"
    heldout.write_text(
        '{"prompt": "a red square moving left slowly"}\n{"prompt": "a cyan circle moving right quickly"}\n', "utf-8"
    )
    return RunConfig.load(
        "tiny",
        [
            f"out={out}",
            f"prompts.heldout={heldout}",
            "updates=4",
            "rollout.prompts=2",
            "rollout.group_size=2",
            "rollout.num_steps=4",
            *EXACT,
            "optim.micro_batch=2",
            "evaluation.every=2",
            "evaluation.num_steps=3",
            "evaluation.samples_per_prompt=1",
            "evaluation.videos=0",
            "checkpoint.every=1",
            "tracking.progress=false",
            *overrides,
        ],
    )


def by_its_process(name: str, *flow: str) -> list[str]:
    """Take a preset, with `rollout` and `evaluation` of its process, or with overrides of the flow process."""
    process = PRESETS[name].explore.process
    kinds = [f"{part}={{kind: {process}}}" for part in ("rollout", "evaluation")]
    return [f"algorithm={name}", *(flow if process == FLOW else kinds)]


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    """Starts jobs in processes of their own."""
    nursery = Nursery(tmp_path_factory.mktemp("jobs"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def unchecked():
    """Leave out the checks of types and shapes: for an experiment, which repeats for minutes what others check."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def make_run(tmp_path: Path):
    """Settings of a very small run in `tmp_path/run`, with overrides."""
    return lambda *overrides: small_run(tmp_path / "run", *overrides)


@pytest.fixture
def make_model(make_run):
    """The bundled model, with overrides of its run's settings."""

    def make(*overrides: str) -> VideoModel:
        config = make_run(*overrides)
        keep = config.algorithm.objective.needs_reference
        return load_model(config.model, single_process(), config.seed, keep_reference=keep)

    return make


WEIGHTS = Path(__file__).parent.parent / "src/flashgrpo/models/tiny/weights"

SLOW = [line for line in (Path(__file__).parent / "slow.txt").read_text("utf-8").splitlines() if line[:1] not in "#"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make test` leaves to `make test-all`."""
    for item in items:
        if any(is_slow(item.nodeid.removeprefix("tests/"), line) for line in SLOW):
            item.add_marker("slow")


def is_slow(name: str, line: str) -> bool:
    """Whether a test's id begins as the line says; a * stands for anything."""
    first, *others = line.split("*")
    return name.startswith(first) and all(part in name for part in others)
