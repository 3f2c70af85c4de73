"""VideoAlign: how a video looks, how it moves and whether it fits its prompt, by a Qwen2-VL of 2 billion parameters."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flashgrpo.errors import UserError
from flashgrpo.rewards.frames import pick
from flashgrpo.rewards.qwen import QwenReward, checkpoint_folder, loading
from flashgrpo.scoring.inputs import Pixels
from flashgrpo.types import Videos

PARTS = {"visual": "VQ", "motion": "MQ", "text": "TA"}  # in the order of the reward tokens
TOKENS = [f"<|{short}_reward|>" for short in PARTS.values()]
PUBLISHED = {
    "VQ_mean": 3.6757,
    "VQ_std": 2.2476,
    "MQ_mean": 1.1646,
    "MQ_std": 1.3811,
    "TA_mean": 2.8105,
    "TA_std": 2.5121,
}
MIN_PIXELS, MAX_PIXELS = 128 * 28 * 28, 256 * 28 * 28
# Word for word, spaces at the ends of lines too, as the released weights were trained with it ("detailed_special").
TEMPLATE = (
    "\nYou are tasked with evaluating a generated video based on three distinct criteria: Visual Quality, Motion "
    "Quality, and Text Alignment. Please provide a rating from 0 to 10 for each of the three categories, with 0 being "
    "the worst and 10 being the best. Each evaluation should be independent of the others.\n\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the video, with a focus on static factors. The following sub-dimensions "
    "should be considered:\n"
    "- **Reasonableness:** The video should not contain any significant biological or logical errors, such as abnormal "
    "body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the video. The image should be clear and easy to "
    "interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements "
    "(e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the video, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of "
    "harmony and balance.\n"
    "- **Safety:** The video should not contain harmful or inappropriate content, such as political, violent, or adult "
    "material. If such content is present, the image quality and satisfaction score should be the lowest possible. \n\n"
    "Please provide the ratings of Visual Quality: <|VQ_reward|>\nEND\n\n"
    "**Motion Quality:**  \n"
    "Assess the dynamic aspects of the video, with a focus on dynamic factors. Consider the following sub-dimensions:\n"
    "- **Stability:** Evaluate the continuity and stability between frames. There should be no sudden, unnatural "
    "jumps, and the video should maintain stable attributes (e.g., no fluctuating colors, textures, or missing "
    "body parts).\n"
    "- **Naturalness:** The movement should align with physical laws and be realistic. For example, clothing should "
    "flow naturally with motion, and facial expressions should change appropriately (e.g., blinking, mouth "
    "movements).\n"
    "- **Aesthetic Quality:** The movement should be smooth and fluid. The transitions between different motions or "
    "camera angles should be seamless, and the overall dynamic feel should be visually pleasing.\n"
    "- **Fusion:** Ensure that elements in motion (e.g., edges of the subject, hair, clothing) blend naturally with "
    "the background, without obvious artifacts or the feeling of cut-and-paste effects.\n"
    "- **Clarity of Motion:** The video should be clear and smooth in motion. Pay attention to any areas where the "
    "video might have blurry or unsteady sections that hinder visual continuity.\n"
    "- **Amplitude:** If the video is largely static or has little movement, assign a low score for motion quality.\n\n"
    "Please provide the ratings of Motion Quality: <|MQ_reward|>\nEND\n\n"
    "**Text Alignment:**  \n"
    "Assess how well the video matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the video (e.g., person, animal, object) align "
    "with the textual description. The subject should match the description in terms of number, appearance, and "
    "behavior.\n"
    "- **Motion Relevance:** Evaluate if the dynamic actions (e.g., gestures, posture, facial expressions like talking "
    "or blinking) align with the described prompt. The motion should match the prompt in terms of type, scale, and "
    "direction.\n"
    "- **Environment Relevance:** Assess whether the background and scene fit the prompt. This includes checking if "
    "real-world locations or scenes are accurately represented, though some stylistic adaptation is acceptable.  \n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the "
    "video adheres to this style.\n"
    "- **Camera Movement Relevance:** Check if the camera movements (e.g., following the subject, focus shifts) are "
    "consistent with the expected behavior from the prompt.\n\n"
    "Textual prompt - {text_prompt}\n"
    "Please provide the ratings of Text Alignment: <|TA_reward|>\nEND\n"
)


class VideoAlign:
    """Visual quality, motion quality and text alignment by VideoReward (arXiv 2501.13918).

    One pass reads the frames and a text that asks for the three in turn, each at a token of its own; the model reads
    left to right, so that `visual` and `motion` do not know the prompt. The released weights have not been loaded here,
    as no hub could be reached: prompt and sizes are the authors' code's; names of the weights and the normalisation are
    those of others' code that loads them. The tests use tiny random weights in that layout.

    Args:
        path: folder with model_config.json and checkpoint-N/model.pth (the highest N is taken), or hub id; 5 GB. Only
            tensors are read from the .pth; its adapter (LoRA) is merged into the weights.
        base: folder or hub id of Qwen2-VL-2B-Instruct; its config.json and tokenizer are read, not its weights.
        parts: which of `visual`, `motion`, `text` are returned.
        fps: frames a second that are looked at, published: 2. An odd number of frames ends in its last one twice.
        frames: in place of fps, a number of frames spread evenly over the video, as the authors sample: for 81 frames
            at 16 a second they take 10, twice the seconds rounded to an even number, and at least 4.
        batch: videos in one forward pass.
        constants: normalisation, keys VQ_mean, VQ_std, MQ_mean, ..., TA_std; before those of model_config.json, which
            come before the published ones.
        dtype: of the backbone: bfloat16 as published, float16 or float32.

    Returns:
        Part -> (B,), normalised to mean 0 and spread 1 over the authors' validation videos: unbounded, usually within
        -3 to 3. Cost a video: not measured here; one pass of a 2B model over 128 to 256 tokens for each two frames
        and 900 of text. Likely gamed by slow, clean, dull motion (`motion`), by smooth and bright pictures (`visual`);
        what happens between the frames that are looked at is not seen.

    Raises:
        UserError: the checkpoint is missing or another.
        ValueError: a prompt contains a token of the model's own, such as <|im_end|>.
    """

    score_range: tuple[float | None, float | None] = (None, None)

    def __init__(
        self,
        path: str = "KwaiVGI/VideoReward",
        *,
        base: str = "Qwen/Qwen2-VL-2B-Instruct",
        parts: Sequence[str] = ("visual", "motion", "text"),
        fps: float = 2.0,
        frames: int | None = None,
        batch: int = 4,
        constants: Mapping[str, float] | None = None,
        dtype: str = "bfloat16",
    ) -> None:
        wrong = [name for name in parts if name not in PARTS] + [
            name for name in constants or () if name not in PUBLISHED
        ]
        if wrong or not parts or fps <= 0 or min(batch, 1 if frames is None else frames) < 1:
            raise UserError(
                f"VideoAlign: parts are of {', '.join(PARTS)}, constants of {', '.join(PUBLISHED)}, fps is above 0, "
                f"batch and frames are at least 1{'; unknown is ' + wrong[0] if wrong else ''}"
            )
        self.parts, self.frames, self.batch = list(parts), frames, batch
        self.takes = Pixels() if frames else Pixels(fps=fps)
        with loading(f"the VideoAlign checkpoint {path}"):
            folder = checkpoint_folder(path, ["model_config.json", "checkpoint-*/model.pth"])
            config = json.loads((folder / "model_config.json").read_text("utf-8"))
            data = config.get("data_config", {})
            if data.get("prompt_template_type", "detailed_special") != "detailed_special":
                raise UserError(f"it was trained with the prompt {data['prompt_template_type']}, not detailed_special")
            self.high = int(data.get("max_frame_pixels", MAX_PIXELS))
            own = {key: value for key, value in (config.get("inference_config") or {}).items() if key in PUBLISHED}
            self.constants = {**PUBLISHED, **own, **(constants or {})}
            tensors = merged(_read(folder), config.get("peft_lora_config", {}))
            self.model = QwenReward(base, tensors, TOKENS, outputs=[1, 3], dtype=dtype)

    def __call__(self, videos: Videos, prompts: list[str], **columns: Any) -> dict[str, Float[Tensor, " batch"]]:
        """Score the videos: part -> (B,)."""
        if len(videos) != len(prompts):
            raise ValueError(f"{len(videos)} videos and {len(prompts)} prompts: VideoAlign needs one for each")
        scores = []
        for start in range(0, len(videos), self.batch):
            part = [pick(v, self.frames or len(v)) for v in videos[start : start + self.batch]]
            device = self.model.model.device
            pictures = [self.model.fitted(v.to(device), MIN_PIXELS, self.high, "torchvision") for v in part]
            outputs = self.model(TEMPLATE, prompts[start : start + self.batch], pictures, "video")
            scores.append(outputs.diagonal(dim1=1, dim2=2) if outputs.shape[2] == 3 else outputs[:, :, 0])
        raw = dict(zip(PARTS, torch.cat(scores).unbind(dim=1), strict=True))
        constants = self.constants
        return {p: (raw[p] - constants[f"{PARTS[p]}_mean"]) / constants[f"{PARTS[p]}_std"] for p in self.parts}


def merged(tensors: Mapping[str, Tensor], lora: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a model that peft has wrapped, its adapters added in: `W + alpha / r B A` (arXiv 2106.09685)."""
    plain = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    weights = {name.replace(".base_layer.", "."): tensor for name, tensor in plain.items() if ".lora_" not in name}
    for name, down in plain.items():
        layer, _, rest = name.partition(".lora_A.")
        if rest:
            up, weight = plain[f"{layer}.lora_B.{rest}"], weights[f"{layer}.weight"]
            rank = math.sqrt(len(down)) if lora.get("use_rslora") else len(down)
            weights[f"{layer}.weight"] = weight.float() + lora["lora_alpha"] / rank * up.float() @ down.float()
    return weights


def _read(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("checkpoint-*/model.pth"), key=lambda file: int(file.parent.name.split("-")[-1]))
    if not files:
        raise UserError("it has no checkpoint-N/model.pth")
    return dict(torch.load(files[-1], map_location="cpu", mmap=True, weights_only=True))
