"""The rewards on Qwen2-VL, tiny random weights in the layout that is released, against the authors' way by hand."""

import hashlib
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from flashgrpo.errors import UserError
from flashgrpo.rewards import hpsv3, videoalign
from flashgrpo.rewards.hpsv3 import HPSv3, mean_of_best
from flashgrpo.rewards.videoalign import PUBLISHED, TOKENS, VideoAlign
from flashgrpo.scoring.inputs import Pixels

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # peft 0.21 asks transformers 5.23 for it
OWN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
OWN += ["<|video_pad|>"]
PROMPTS = ["a red circle", "a blue square {moving} slowly to the left , then a red one"]
WORDS = sorted(
    {word for text in (*PROMPTS, hpsv3.TEMPLATE, videoalign.TEMPLATE) for word in text.split() if "<|" not in word}
)
SIZE = (280, 364)
PIXELS = 280 * 364
HAND = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>"
)
LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Rewarded(Qwen2VLForConditionalGeneration):
    """As both authors have it: the head beside the whole model, the text's own positions over the picture too."""

    def __init__(self, config: Qwen2VLConfig, head: nn.Module) -> None:
        super().__init__(config)
        self.rm_head = head

    @torch.no_grad()
    def by_hand(self, tokenizer, template, prompt, cut, grid, kind, tokens):
        pads = f"<|{kind}_pad|>" * int(grid.prod() // 4)
        chat = HAND.format(pads=pads) + template.format(text_prompt=prompt) + "<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(chat, return_tensors="pt").input_ids
        embedded = self.get_input_embeddings()(ids)
        seen = self.model.get_image_features(cut, grid[None]).pooler_output[0]
        pad = tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>")
        embedded = embedded.masked_scatter((ids == pad)[..., None], seen)
        hidden = self.model.language_model(inputs_embeds=embedded).last_hidden_state
        return self.rm_head(hidden)[torch.isin(ids, torch.tensor(tokenizer.convert_tokens_to_ids(tokens)))]


def old(name: str) -> str:
    """A weight's name by transformers 4.45, which both authors used."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def tuned(base, tokens, head) -> tuple[Rewarded, PreTrainedTokenizerFast]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(tokens, special_tokens=True)
    config = Qwen2VLConfig.from_pretrained(base)
    config.text_config.vocab_size = len(tokenizer)
    model = Rewarded(config, head).eval()
    for parameter in model.model.language_model.parameters():
        nn.init.normal_(parameter, std=1.0)  # large enough that attention, and with it each position, matters
    return model, tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *WORDS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<|endoftext|>")
    fast.add_tokens(OWN, special_tokens=True)
    fast.save_pretrained(path)
    ids = dict(zip(OWN, fast.convert_tokens_to_ids(OWN), strict=True))
    width = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [2, 1, 1], "rope_theta": 1e6}
    text = {**width, "num_key_value_heads": 1, "vocab_size": len(fast) + 9, "rope_parameters": rope}
    vision = {"depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 16, "patch_size": 14}
    special = {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"]}
    Qwen2VLConfig(text_config=text, vision_config=vision, **special).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def hps(base, tmp_path_factory):
    head = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    model, tokenizer = tuned(base, ["<|Reward|>"], head)
    path = tmp_path_factory.mktemp("hps")
    save_file({old(name): tensor for name, tensor in model.state_dict().items()}, path / "HPSv3.safetensors")
    assert {"visual.merger.mlp.2.bias", "model.embed_tokens.weight", "rm_head.5.weight"} <= {
        *map(old, model.state_dict())
    }
    return str(path), model, tokenizer


def align(base, path, outputs: int, inference: dict | None = None):
    """A checkpoint as peft leaves it around the whole model, and the model, its adapters not merged."""
    model, tokenizer = tuned(base, TOKENS, nn.Linear(16, outputs, bias=False))
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=LORA)).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    (path / "checkpoint-9").mkdir(parents=True)  # a step that is not the last
    (path / "checkpoint-11352").mkdir()
    torch.save({"a": torch.zeros(1)}, path / "checkpoint-9" / "model.pth")
    torch.save({old(n): tensor for n, tensor in wrapped.state_dict().items()}, path / "checkpoint-11352" / "model.pth")
    data = {"max_frame_pixels": PIXELS, "prompt_template_type": "detailed_special", "fps": 2.0}
    config = {"data_config": data, "peft_lora_config": {"lora_r": 4, "lora_alpha": 8, "use_rslora": False}}
    config |= {"inference_config": inference} if inference else {}
    (path / "model_config.json").write_text(json.dumps(config), "utf-8")
    return str(path), model, tokenizer


@pytest.fixture(scope="module")
def video_reward(base, tmp_path_factory):
    return align(base, tmp_path_factory.mktemp("align"), outputs=1)


@pytest.fixture(scope="module")
def videos():
    return torch.randint(0, 256, (2, 4, 3, *SIZE), generator=torch.Generator().manual_seed(0)) / 255


def processed(frame, pixels=PIXELS):
    """A frame through PIL and the model's own image processor, which resizes it once more, to the same size."""
    picture = Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).numpy())
    height, width = smart_resize(*frame.shape[1:], min_pixels=pixels, max_pixels=pixels)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    out = Qwen2VLImageProcessorPil()(images=[picture], return_tensors="pt")
    return out.pixel_values, out.image_grid_thw[0]


def processed_video(frames):
    """A video's patches out of its frames' as images: of each pair, the first of one and the second of the other."""
    cut = [processed(frame)[0].view(-1, 3, 2, 14, 14) for frame in frames]
    pairs = [torch.stack([a[:, :, 0], b[:, :, 1]], dim=2).flatten(1) for a, b in zip(cut[::2], cut[1::2], strict=True)]
    return torch.cat(pairs), torch.tensor([len(pairs), 20, 26])


def test_hpsv3_is_the_authors_model(base, hps, videos):
    path, model, tokenizer = hps
    reward = HPSv3(path, base=base, best=0.5, batch=3, pixels=PIXELS, dtype="float32")
    assert reward.takes == Pixels(stride=1)
    assert HPSv3(path, base=base, stride=4).takes == Pixels(stride=4)
    template = hpsv3.TEMPLATE
    hand = torch.stack([
        model.by_hand(tokenizer, template, prompt, *processed(frame), "image", ["<|Reward|>"])[0, 0]
        for video, prompt in zip(videos, PROMPTS, strict=True)
        for frame in video
    ]).view(2, 4)  # fmt: skip
    scores = reward(videos, PROMPTS, color=["red", "blue"])
    torch.testing.assert_close(scores, hand.topk(2, dim=1).values.mean(dim=1), rtol=1e-4, atol=1e-6)
    assert hand.std() > 0.01  # or positions and pictures would not be told apart
    torch.testing.assert_close(reward(videos.flip(0), PROMPTS[::-1]), scores.flip(0), rtol=1e-4, atol=1e-6)
    alone = torch.cat([reward(videos[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(alone, scores, rtol=1e-4, atol=1e-6)
    assert reward(videos[:1], ["a very long prompt " * 300]).isfinite().all()
    with pytest.raises(ValueError, match="2 videos and 1 prompts"):
        reward(videos, PROMPTS[:1])
    with pytest.raises(ValueError, match=r"a prompt contains <\|Reward\|>"):
        reward(videos, [PROMPTS[0], "a circle <|Reward|>"])


def test_the_best_frames_count():
    scores = torch.tensor([[1.0, 9.0, 3.0, 8.0, 2.0, 7.0, 0.0, 4.0, 5.0, 6.0], [1.0] * 10])
    assert mean_of_best(scores, 0.3).tolist() == [8.0, 1.0]  # 9, 8 and 7
    assert mean_of_best(scores[:, :3], 0.3).tolist() == [9.0, 1.0]  # one at least
    assert mean_of_best(torch.arange(81.0)[None], 0.3).tolist() == [68.5]  # 24 of 81, as published
    assert mean_of_best(scores, 1.0).tolist() == [4.5, 1.0]


def test_videoalign_is_the_authors_model(base, video_reward, videos):
    path, model, tokenizer = video_reward
    reward = VideoAlign(path, base=base, dtype="float32")
    assert reward.takes == Pixels(fps=2.0)
    hand = torch.stack([
        model.by_hand(tokenizer, videoalign.TEMPLATE, prompt, *processed_video(video), "video", TOKENS)[:, 0]
        for video, prompt in zip(videos, PROMPTS, strict=True)
    ])  # fmt: skip
    scores = reward(videos, PROMPTS)
    mean, std = (torch.tensor([PUBLISHED[f"{part}_{what}"] for part in ("VQ", "MQ", "TA")]) for what in ("mean", "std"))
    assert list(scores) == ["visual", "motion", "text"]
    torch.testing.assert_close(torch.stack([*scores.values()], dim=1), (hand - mean) / std, rtol=1e-4, atol=1e-5)
    one = VideoAlign(path, base=base, dtype="float32", batch=1, parts=["text"])(videos.flip(0), PROMPTS[::-1])
    assert list(one) == ["text"]
    torch.testing.assert_close(one["text"].flip(0), scores["text"], rtol=1e-4, atol=1e-6)
    other = reward(videos, PROMPTS[::-1])  # the model reads left to right, and the prompt comes last
    torch.testing.assert_close(other["motion"], scores["motion"], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(other["text"], scores["text"], rtol=1e-4, atol=1e-6)
    odd = torch.cat([videos[:, :3], videos[:, 2:3]], dim=1)
    torch.testing.assert_close(reward(videos[:, :3], PROMPTS)["motion"], reward(odd, PROMPTS)["motion"])


def test_videoalign_settings(base, video_reward, videos, tmp_path):
    path = video_reward[0]
    spread = VideoAlign(path, base=base, dtype="float32", frames=2)
    assert spread.takes == Pixels()
    ends = VideoAlign(path, base=base, dtype="float32")(videos[:, [0, 3]], PROMPTS)
    torch.testing.assert_close(spread(videos, PROMPTS)["visual"], ends["visual"])
    own, model, tokenizer = align(base, tmp_path, outputs=3, inference={"VQ_mean": 1.0, "VQ_std": 2.0, "more": 3})
    reward = VideoAlign(own, base=base, dtype="float32", constants={"VQ_std": 4.0})
    assert reward.constants == PUBLISHED | {"VQ_mean": 1.0, "VQ_std": 4.0}
    cut = processed_video(videos[0])
    hand = model.by_hand(tokenizer, videoalign.TEMPLATE, PROMPTS[0], *cut, "video", TOKENS).diagonal()
    torch.testing.assert_close(reward(videos, PROMPTS)["visual"][0], (hand[0] - 1) / 4, rtol=1e-4, atol=1e-6)
    exact, rounded = (VideoAlign(path, base=base, dtype=t)(videos, PROMPTS)["text"] for t in ("float32", "bfloat16"))
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.1)


def test_pictures_are_those_of_the_models_own_processor(base, hps):
    model, published = HPSv3(hps[0], base=base, dtype="float32").model, 256 * 28 * 28
    for height, width in ((40, 40), (70, 150), (150, 70), (480, 832), (33, 900)):
        frame = torch.rand(3, height, width, generator=torch.Generator().manual_seed(1))
        cut, grid = processed(frame, published)
        patches, shape = model._patches(model.fitted(frame[None], published, published, "PIL"))
        assert list(shape) == grid.tolist()
        off = (patches - cut).abs() / (
            1 / 255 / 0.26
        )  # in 8-bit levels; noise, which is harder to resize than pictures
        assert off.max() < 2.2
        assert off.mean() < 0.002
    frame = model.fitted(frame[None], 1, PIXELS, "torchvision")
    image, still = model._patches(frame), model._patches(frame.expand(2, 3, *frame.shape[-2:]))
    assert torch.equal(image[0], still[0])  # two equal frames are the image
    assert image[1] == still[1]
    for height, width, fitted in ((480, 832, (336, 588)), (48, 48, (336, 336)), (10, 10, (336, 336))):
        frame = torch.rand(1, 3, height, width)
        assert model.fitted(frame, 128 * 784, 256 * 784, "torchvision").shape[-2:] == fitted
    with pytest.raises(ValueError, match="one side is over 200 times the other"):
        model.fitted(torch.rand(1, 3, 2, 500), 1, PIXELS, "PIL")


def test_videos_are_those_of_the_models_own_video_processor(base, hps, videos):
    pytest.importorskip("torchvision")
    from transformers import Qwen2VLVideoProcessor

    model = HPSv3(hps[0], base=base, dtype="float32").model
    levels = (videos[0] * 255).round().byte()
    out = Qwen2VLVideoProcessor()(videos=[levels], do_resize=False, do_sample_frames=False, return_tensors="pt")
    patches, shape = model._patches(model.fitted(videos[0], PIXELS, PIXELS, "torchvision"))
    assert list(shape) == out.video_grid_thw[0].tolist()
    torch.testing.assert_close(patches, out.pixel_values_videos, rtol=1e-4, atol=1e-5)


def test_prompts_are_the_authors_word_for_word():
    """Digests of their texts: VideoAlign's prompt_template.py and HPSv3's data_collator_qwen.py."""
    digests = [hashlib.sha256(part.TEMPLATE.encode()).hexdigest()[:16] for part in (videoalign, hpsv3)]
    assert digests == ["fdb6309bac618dd0", "f6ee57479d4e9eee"]


def test_what_cannot_be_loaded(base, hps, video_reward, videos, tmp_path):
    with pytest.raises(UserError, match=r"the HPSv3 checkpoint .*nothing could not be loaded"):
        HPSv3(str(tmp_path / "nothing"), base=base)
    with pytest.raises(UserError, match=r"the VideoAlign checkpoint .* could not be loaded: .*model_config.json"):
        VideoAlign(str(tmp_path), base=base)
    with pytest.raises(UserError, match=r"the HPSv3 checkpoint .* could not be loaded"):
        HPSv3(hps[0], base=str(tmp_path))
    (tmp_path / "model_config.json").write_text('{"data_config": {"prompt_template_type": "simple"}}', "utf-8")
    with pytest.raises(UserError, match="it was trained with the prompt simple, not detailed_special"):
        VideoAlign(str(tmp_path), base=base)
    (tmp_path / "model_config.json").write_text("{}", "utf-8")
    with pytest.raises(UserError, match=r"it has no checkpoint-N/model\.pth"):
        VideoAlign(str(tmp_path), base=base)
    (tmp_path / "checkpoint-1").mkdir()
    torch.save({"code": print}, tmp_path / "checkpoint-1" / "model.pth")  # more than tensors: refused
    with pytest.raises(UserError, match="could not be loaded: Weights only load failed"):
        VideoAlign(str(tmp_path), base=base)
    tensors = {new: tensor for new, tensor in hps[1].state_dict().items() if "embed_tokens" not in new}
    save_file(tensors, tmp_path / "HPSv3.safetensors")
    with pytest.raises(UserError, match=r"as a tuned .*language_model.embed_tokens.weight is missing"):
        HPSv3(str(tmp_path), base=base)
    save_file(hps[1].state_dict(), tmp_path / "HPSv3.safetensors")  # names by transformers 5 load as well
    torch.testing.assert_close(*(HPSv3(p, base=base, pixels=PIXELS)(videos, PROMPTS) for p in (str(tmp_path), hps[0])))
    save_file({n: t for n, t in hps[1].state_dict().items() if "rm_head" not in n}, tmp_path / "HPSv3.safetensors")
    with pytest.raises(UserError, match="it has no reward head"):
        HPSv3(str(tmp_path), base=base)
    with pytest.raises(UserError, match="dtype must be one of bfloat16, float16, float32, not 'half'"):
        HPSv3(hps[0], base=base, dtype="half")
    with pytest.raises(UserError, match=r"best=0.0 must be in \(0, 1\]"):
        HPSv3(hps[0], base=base, best=0.0)
    with pytest.raises(UserError, match="its head has 2 outputs, not 1 or 3"):
        VideoAlign(align(base, tmp_path / "two", outputs=2)[0], base=base)
    with pytest.raises(UserError, match="unknown is sound"):
        VideoAlign(video_reward[0], base=base, parts=["sound"])
