"""Model folders, and what is asked of a model."""

import shutil

import pytest

from tests.bad_inputs.cases import Case
from tools.tiny.build import WEIGHTS

INDEX = "folder/model_index.json"
FOLDER = "train RECIPE model.path=HERE/folder"

CASES = [
    Case("train RECIPE model.path=HERE/nowhere", "model.path: there is no folder"),
    Case(FOLDER, "is no diffusers pipeline", {"folder/README.md": ""}),
    Case(FOLDER, "StableDiffusionPipeline, which is not", {INDEX: '{"_class_name": "StableDiffusionPipeline"}'}),
    Case(FOLDER, "is no readable model_index.json", {INDEX: "{"}),
    Case(
        FOLDER,
        "has no scheduler, which a WanPipeline with its settings needs",
        {INDEX: '{"_class_name": "WanPipeline"}'},
    ),
    Case("train RECIPE model.path=nobody/nothing", "could not be had from the hub"),
    Case("train RECIPE model.height=50", "model.height: 50 is no multiple of 16; the nearest is 48"),
    Case("train RECIPE model.num_frames=8", "model.num_frames: 8 is no multiple of 4 plus 1; the nearest is 9"),
    Case("train RECIPE model.train.targets=[to_z]", "match no linear layer"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_models(refuse, case):
    refuse(case)


def test_a_pipeline_with_damaged_weights(refuse, tmp_path):
    shutil.copytree(WEIGHTS, tmp_path / "damaged")
    weights = tmp_path / "damaged/transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refuse(Case("train RECIPE model.path=HERE/damaged", "damaged could not be loaded: "))
