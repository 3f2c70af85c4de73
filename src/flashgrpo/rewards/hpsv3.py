"""HPSv3: what people would prefer, frame by frame, by a Qwen2-VL of 7 billion parameters."""

from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from flashgrpo.errors import UserError
from flashgrpo.rewards.qwen import QwenReward, checkpoint_folder, loading
from flashgrpo.scoring.inputs import Pixels
from flashgrpo.types import Videos

FILE = "HPSv3.safetensors"
# Word for word, spaces at the ends of lines too, as the released weights were trained with it.
TEMPLATE = (
    "\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall "
    "score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being "
    "the best. \n\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal "
    "body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to "
    "interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements "
    "(e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of "
    "harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult "
    "material. If such content is present, the image quality and satisfaction score should be the lowest possible. \n\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align "
    "with the textual description. The subject should match the description in terms of number, appearance, and "
    "behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the "
    "image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image "
    "logically fit the scenario described in the prompt. The environment should support and enhance the subject "
    "without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, "
    "accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, "
    "but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the "
    "image. The generated content should not introduce elements that conflict with or distort the original "
    "description.\n"
    "Textual prompt - {text_prompt}\n\n\n"
    "\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND\n"
)


class HPSv3:
    """Mean of the best frames' scores by HPSv3 (arXiv 2508.03789), the reward of the published Flash-GRPO run.

    Each frame is scored as an image with its prompt; the score is the mean `mu` of the predicted normal distribution,
    whose spread is not used. The released weights have not been loaded here, as no hub could be reached: head and
    sizes are the authors' code's; prompt and names of the weights are those of others' code that loads them. The tests
    use tiny random weights in that layout.

    Args:
        path: folder with HPSv3.safetensors, or hub id; 16 GB in bfloat16.
        base: folder or hub id of Qwen2-VL-7B-Instruct; its config.json and tokenizer are read, not its weights.
        best: share of the frames, best first, that counts: rounded down, at least one frame. Published: 0.3.
        stride: every `stride`-th frame is scored. Published: 1.
        batch: frames in one forward pass.
        pixels: size to which every frame is resized, about. Published: 256 * 28 * 28.
        dtype: of the backbone: bfloat16 as published, float16 or float32.

    Returns:
        (B,) for videos (B, F, 3, H, W) in [0, 1]: unbounded. The paper of Flash-GRPO goes from 4.7 to 5.4 with it; bad
        pictures fall below 0. Cost a video: not measured here; F / stride passes of a 7B model over about 252 tokens of
        picture and 500 of text. The published run sent frames as JPEG files, here they come as they are. Likely gamed
        by detailed, saturated stills, and by a video that is good in one third and bad elsewhere; it sees no motion.

    Raises:
        UserError: the checkpoint is missing or another.
        ValueError: a prompt contains a token of the model's own, such as <|im_end|>.
    """

    score_range: tuple[float | None, float | None] = (None, None)

    def __init__(
        self,
        path: str = "MizzenAI/HPSv3",
        *,
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        best: float = 0.3,
        stride: int = 1,
        batch: int = 8,
        pixels: int = 256 * 28 * 28,
        dtype: str = "bfloat16",
    ) -> None:
        if not 0 < best <= 1 or min(stride, batch, pixels) < 1:
            raise UserError(f"HPSv3: {best=} must be in (0, 1], {stride=}, {batch=} and {pixels=} at least 1")
        self.takes = Pixels(stride=stride)
        self.best, self.batch, self.pixels = best, batch, pixels
        with loading(f"the HPSv3 checkpoint {path}"):
            tensors = load_file(checkpoint_folder(path, [FILE]) / FILE)
            self.model = QwenReward(base, tensors, ["<|Reward|>"], outputs=[2], dtype=dtype)

    def __call__(self, videos: Videos, prompts: list[str], **columns: Any) -> Float[Tensor, " batch"]:
        """Score the videos: mean `mu` of the best frames, (B,)."""
        if len(videos) != len(prompts):
            raise ValueError(f"{len(videos)} videos and {len(prompts)} prompts: HPSv3 needs one for each")
        count = videos.shape[1]
        frames = videos.flatten(0, 1)
        texts = [prompt for prompt in prompts for _ in range(count)]
        means = []
        for start in range(0, len(frames), self.batch):
            part = frames[start : start + self.batch].to(self.model.model.device).float()
            pictures = self.model.fitted(part, self.pixels, self.pixels, "PIL")[:, None]
            outputs = self.model(TEMPLATE, texts[start : start + self.batch], list(pictures), "image")
            means.append(outputs[:, 0, 0])
        return mean_of_best(torch.cat(means).unflatten(0, (len(videos), count)), self.best)


def mean_of_best(scores: Float[Tensor, "batch frames"], share: float) -> Float[Tensor, " batch"]:
    """Mean of the highest `int(F share)` of F scores, of one at least: 3 of 10, 24 of 81 for 0.3."""
    count = max(1, int(scores.shape[1] * share + 1e-6))
    return scores.topk(count, dim=1).values.mean(dim=1)
