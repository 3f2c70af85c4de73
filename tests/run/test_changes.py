"""What a later start of a run may change of how is learnt: the numbers, and none of the choices."""

from dataclasses import asdict

import pytest

from flashgrpo.config.algorithm import read_tree
from flashgrpo.config.recipe import merge_choices
from flashgrpo.errors import UserError
from flashgrpo.run.directory import RunDirectory
from tests.conftest import small_run

RUNS = {
    "flash-grpo": (),
    "flow-dppo": (),
    "awm": ("rollout.num_steps=20",),
    "diffusion-nft": (),
    "v-grpo": ("algorithm.behaviour={kind: frozen, updates: 3}",),
}
CHOICES = {"std": "group", "combine": "raw", "bend": "soft", "rescale": "largest", "pull_flat": True}


@pytest.mark.parametrize("name", RUNS)
def test_numbers_may_change_and_choices_may_not(tmp_path, name):
    config = small_run(tmp_path / "run", f"algorithm={name}", *RUNS[name])
    directory = RunDirectory(tmp_path / "run")
    (directory.checkpoints / "000001").mkdir(parents=True)
    directory.config_file.write_text(config.to_yaml(), "utf-8")

    def check(part: str, key: str, value: object) -> None:
        change = read_tree({"algorithm": {part: {key: value}}}, "a test")
        directory.check(config.parse(merge_choices(config.model_dump(mode="json"), change), "a test"))

    for part in ("objective", "credit", "behaviour"):
        for key, value in asdict(getattr(config.algorithm, part)).items():
            if key == "average_coef" and not hasattr(config.algorithm.behaviour, "ceiling"):
                continue  # without an average there is no penalty to it
            if key == "unsafe_weight" and not config.algorithm.credit.anchored:
                continue
            if isinstance(value, int | float) and not isinstance(value, bool):
                check(part, key, value + 1 if isinstance(value, int) else (value or 1e-4) / 2)
            elif CHOICES.get(key, value) != value:
                with pytest.raises(UserError, match=rf"another algorithm\..*{key} "):
                    check(part, key, CHOICES[key])
            else:
                assert key in ("kind", "baseline", "draws", *CHOICES)
