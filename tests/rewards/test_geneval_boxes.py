"""GenEval's rules by hand, its metadata as they are published, and the detector on a tiny random OWLv2."""

import json

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPProcessor, Owlv2Config, Owlv2ForObjectDetection, Owlv2Processor
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

from flashgrpo.errors import UserError
from flashgrpo.prompts import columns_of, read_prompts
from flashgrpo.rewards.geneval_boxes import (
    GenevalBoxes,
    checks,
    clauses,
    intersection_over_union,
    relations,
    suppressed,
    within,
)
from tests.rewards.test_clip_rewards import folder as clip  # noqa: F401  (a fixture)
from tools.tiny.architecture import make_tokenizer

DOG, CAT, FAR = (0.0, 0.0, 9.0, 9.0), (40.0, 0.0, 49.0, 9.0), (40.0, 40.0, 49.0, 49.0)
METADATA = [  # lines of GenEval's own file
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "apple", "count": 4}],
        "exclude": [{"class": "apple", "count": 5}],
        "prompt": "a photo of four apples",
    },
    {
        "tag": "position",
        "include": [
            {"class": "parking meter", "count": 1},
            {"class": "zebra", "count": 1, "position": ["right of", 0]},
        ],
        "prompt": "a photo of a zebra right of a parking meter",
    },
    {
        "tag": "color_attr",
        "include": [
            {"class": "handbag", "count": 1, "color": "blue"},
            {"class": "cell phone", "count": 1, "color": "white"},
        ],
        "prompt": "a photo of a blue handbag and a white cell phone",
    },
]


def no_colors(name, boxes):
    raise AssertionError("no colour is asked for")


def test_where_boxes_lie_to_each_other():
    """Centres 40 apart along one side, 10-pixel boxes: the margin takes 0.1 (9 + 9) = 1.8 of it."""
    assert relations(DOG, CAT) == {"left of"}
    assert relations(CAT, DOG) == {"right of"}
    assert relations(CAT, FAR) == {"above"}
    assert relations(FAR, DOG) == {"right of", "below"}, "38.2 / 56.6 = 0.68 of the distance both ways"
    assert relations(DOG, (1.0, 1.0, 10.0, 10.0)) == set(), "nothing is left after the margin"
    assert relations((0.0, 0.0, 100.0, 100.0), (30.0, 0.0, 130.0, 100.0)) == set(), "30 - 20 = 10 is a third of 30"


def test_a_weaker_box_of_the_same_object_does_not_count():
    """Two boxes of 10 x 10 pixels, the last ones included, moved by one: 90 shared of 110."""
    moved = (1.0, 0.0, 10.0, 9.0)
    assert intersection_over_union(DOG, moved) == pytest.approx(90 / 110)
    assert intersection_over_union(DOG, CAT) == 0
    assert suppressed([DOG, moved, CAT], 0.5) == [DOG, CAT]
    assert suppressed([DOG, moved, CAT], 0.9) == [DOG, moved, CAT]


@pytest.mark.parametrize(
    ("objects", "wanted", "unwanted", "held"),
    [
        ({"dog": [DOG]}, [{"class": "dog", "count": 1}], [], [True]),
        ({"dog": [DOG]}, [{"class": "dog", "count": 2}], [], [False]),
        ({"dog": [DOG, CAT, FAR]}, [{"class": "dog", "count": 2}], [{"class": "dog", "count": 3}], [True, False]),
        ({}, [{"class": "dog", "count": 1, "color": "red"}], [], [False, False]),
        (
            {"dog": [DOG], "cat": [CAT]},
            [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
            [],
            [True, True, True],
        ),
        (
            {"dog": [DOG], "cat": [CAT]},
            [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}],
            [],
            [True, True, False],
        ),
        (
            {"dog": [DOG]},
            [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
            [],
            [False, True, False],
        ),
    ],
)
def test_what_holds_of_what_is_asked_for(objects, wanted, unwanted, held):
    assert checks(objects, wanted, unwanted, lambda name, boxes: ["blue"] * len(boxes)) == held


def test_colours_are_asked_of_the_surest_boxes_only():
    """Of three dogs two are asked for, so the third is not looked at; both have to be red."""
    asked = []

    def colors(name, boxes):
        asked.append((name, boxes))
        return ["red", "blue"]

    assert checks({"dog": [DOG, CAT, FAR]}, [{"class": "dog", "count": 2, "color": "red"}], [], colors) == [True, False]
    assert asked == [("dog", [DOG, CAT])]
    assert checks({"dog": [DOG]}, [{"class": "dog", "count": 1}], [], no_colors) == [True]


def test_boxes_are_cut_inside_of_the_picture():
    assert within((-3.2, 1.6, 9.7, 50.0), (20, 10)) == (0, 2, 10, 10)
    assert within((30.0, 30.0, 31.0, 31.0), (20, 10)) == (19, 9, 20, 10), "one pixel at least"


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(make_tokenizer()), "max_position_embeddings": 16}
    vision = {**small, "image_size": 32, "patch_size": 8}
    path = tmp_path_factory.mktemp("owlv2")
    model = Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=16))
    torch.nn.init.normal_(model.class_head.logit_shift.bias)
    model.save_pretrained(path)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 16
    Owlv2Processor(Owlv2ImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(path)
    return str(path)


def test_boxes_are_those_of_the_model_itself(detector, clip):  # noqa: F811
    reward = GenevalBoxes(detector, clip, threshold=0.3, max_overlap=2.0)
    image = Image.fromarray((torch.rand(40, 56, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy())
    names = ["circle", "square"]
    found = reward._detected(image, names, counting=False)
    model, processor = Owlv2ForObjectDetection.from_pretrained(detector), Owlv2Processor.from_pretrained(detector)
    with torch.no_grad():
        out = model(**processor(text=[[f"a photo of a {name}" for name in names]], images=image, return_tensors="pt"))
    scores, labels = out.logits[0].sigmoid().max(dim=-1)
    x, y, w, h = (out.pred_boxes[0] * 56).unbind(-1)  # the picture is filled up to a square
    corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1)
    for number, name in enumerate(names):
        own = [i for i in scores.argsort(descending=True).tolist() if labels[i] == number and scores[i] > 0.3]
        torch.testing.assert_close(torch.tensor(found[name]).view(-1, 4), corners[own[:16]], rtol=1e-4, atol=1e-3)
    assert sum(map(len, found.values())) > 0
    strict = GenevalBoxes(detector, clip, threshold=0.3, counting_threshold=0.999)
    assert not any(strict._detected(image, names, counting=True).values())


def test_colours_are_the_nearest_of_clip(detector, clip):  # noqa: F811
    reward = GenevalBoxes(detector, clip)
    image = Image.new("RGB", (40, 56), "red")
    told = reward._colors(image, "circle", [DOG, (5.0, 5.0, 30.0, 50.0)])
    texts = reward._clip.texts([t.format(color=told[0], name="circle") for t in ("a photo of a {color} {name}",)])
    assert told[0] == told[1]
    assert texts.shape == (1, 12)


def test_a_prompt_file_of_geneval(detector, clip, tmp_path):  # noqa: F811
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in METADATA))
    prompts = read_prompts(str(file), "prompts.train")
    columns = columns_of(prompts)
    assert [prompt.text for prompt in prompts] == [line["prompt"] for line in METADATA]
    assert columns["exclude"] == [None, METADATA[1]["exclude"], None, None]
    videos = torch.rand(4, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    texts = [prompt.text for prompt in prompts]
    sure = GenevalBoxes(detector, clip, threshold=0.0, counting_threshold=0.0, max_overlap=2.0, partial=True)
    scores = sure(videos, texts, **columns)
    assert scores.shape == (4,)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert torch.equal(sure(videos, texts, **columns), scores)
    strict = GenevalBoxes(detector, clip, threshold=1.0, counting_threshold=1.0, partial=True)
    assert strict(videos, texts, **columns).tolist() == [0.0, 0.5, 0.0, 0.0], "no fifth apple is all that holds"
    alone = [METADATA[1]["include"]]
    assert strict(videos[1:2], texts[1:2], alone).tolist() == [0.0], "the other columns may be missing"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (None, "must be a list of GenEval's entries, such as"),
        ([{"class": "dog"}], "must be a list of GenEval's entries, such as"),
        ([{"class": "dog", "count": 1, "color": "gray"}], "color 'gray' must be one of red, orange"),
        ([{"class": "dog", "count": 1, "position": ["above", 0]}], r"must be \[relation, number of an earlier entry\]"),
    ],
)
def test_metadata_that_are_none(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        clauses(given, "include of 'a dog'", required=True)


def test_what_cannot_be_loaded(detector, clip, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match=r"the OWLv2 model .*nothing could not be loaded"):
        GenevalBoxes(str(tmp_path / "nothing"), clip)
    CLIPProcessor(CLIPImageProcessor(), make_tokenizer()).save_pretrained(tmp_path)
    Owlv2ForObjectDetection.from_pretrained(detector).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"the processor of .*model could not be loaded"):
        GenevalBoxes(str(tmp_path / "model"), clip)
