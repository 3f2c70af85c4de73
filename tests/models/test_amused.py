"""aMUSEd's checkpoints through diffusers' classes: as the pipeline computes, trained, and written as they were."""

import warnings
from pathlib import Path

import pytest
import torch
from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel, VQModel
from peft import PeftModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from flashgrpo.distributed.world import single_process
from flashgrpo.errors import UserError
from flashgrpo.models.amused import AmusedModel
from flashgrpo.models.load_tokens import load_token_model
from flashgrpo.models.lora import trained_parameters
from flashgrpo.models.settings import ModelConfig
from flashgrpo.processes.tokens.masked.process import MaskedProcess
from flashgrpo.processes.tokens.masked.settings import MaskedRollout, MaskedSampling, UnmaskedSteps, Unmasking
from flashgrpo.processes.tokens.model import TokenModel
from flashgrpo.types import Prompt, PromptGroup

LORA = {"kind": "lora", "rank": 2, "alpha": 4, "targets": ["to_q", "to_v", "to_out.0"]}
NETWORK = {
    "hidden_size": 32,
    "cond_embed_dim": 16,
    "micro_cond_encode_dim": 8,
    "micro_cond_embed_dim": 40,
    "encoder_hidden_size": 24,
    "vocab_size": 40,
    "codebook_size": 32,
    "in_channels": 32,
    "block_out_channels": 32,
    "num_res_blocks": 1,
    "block_num_heads": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "sample_size": 4,
}


def tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's own kind, of letters."""
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in "abcdef"), *"abcdef"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8)


def write(folder: Path, codes=32, mask=39) -> Path:
    """Write a tiny checkpoint as the pipeline saves one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = CLIPTextConfig(
            vocab_size=14,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=16,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
        )
        vqvae = VQModel(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            num_vq_embeddings=codes,
            norm_num_groups=4,
            mid_block_add_attention=False,
            lookup_from_codebook=True,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            AmusedPipeline(
                vqvae,
                tokenizer(folder),
                CLIPTextModelWithProjection(text),
                UVit2DModel(**NETWORK),
                AmusedScheduler(mask_token_id=mask),
            ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("amused") / "model")


def load(folder: Path, train=LORA, **settings) -> AmusedModel:
    given = {"path": str(folder), "height": 8, "width": 8, "num_frames": 1, "train": train, **settings}
    return load_token_model(ModelConfig.model_validate(given), single_process(), 0, keep_reference=True)


TOKENS = torch.tensor([[3, 39, 5, 39, 0, 31, 39, 39, 1, 2, 39, 4, 39, 39, 39, 9]])


def logits(model, text="a b"):
    return model.call(TOKENS, model.encode([Prompt(text, {})]), lambda hidden, head: head(hidden))


def test_it_is_a_model_of_tokens(folder):
    model = load(folder)
    assert isinstance(model, TokenModel)
    assert (model.vocabulary, model.mask, model.end, model.length) == (32, 39, None, 16)


def test_it_computes_what_the_pipeline_does(folder):
    """Logits of its own network on its own texts, and its own decoding."""
    model = load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = AmusedPipeline.from_pretrained(folder)
    seen = {}
    pipeline.transformer.register_forward_pre_hook(lambda *given: seen.update(given[2]), with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a b", height=8, width=8, num_inference_steps=1, guidance_scale=1.0, output_type="latent").images
    condition = model.encode([Prompt("a b", {})])
    torch.testing.assert_close(condition.tensors["pooled"], seen["pooled_text_emb"])
    torch.testing.assert_close(condition.tensors["text"], seen["encoder_hidden_states"])
    expected = pipeline.transformer(
        TOKENS.view(1, 4, 4), seen["encoder_hidden_states"], seen["pooled_text_emb"], seen["micro_conds"]
    )
    torch.testing.assert_close(logits(model), expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)
    decoded = pipeline.vqvae.decode(images, force_not_quantize=True, shape=(1, 4, 4, 4)).sample.clamp(0, 1)
    torch.testing.assert_close(model.decode(images.flatten(1))[:, 0], decoded)
    assert model.token_counts(["a b", ""]) == [4, 2]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_agrpo_trains_it(folder, guidance):
    """Drawn by the cosine, with guidance, and scored again bit for bit."""
    explore, score = Unmasking(top_k=20, top_p=0.9), UnmaskedSteps(2)
    rollout = MaskedRollout(num_steps=3, schedule="cosine", guidance_scale=guidance, micro_batch=3)
    made = MaskedProcess(load(folder), explore, score, rollout, MaskedSampling(), 3, single_process())
    samples = PromptGroup(0, 0, Prompt("a b", {}), 4).samples
    outputs, record = made.draw(samples, 0, lambda rows, tokens: None, 2)
    assert int(outputs.max()) < 32
    parts = [(part, *made.replay(part, ())[0]) for part in made.micro_batches(record)]
    assert torch.equal(torch.cat([score for _, score, _ in parts]), record.old)
    parts[0][1].sum().backward()
    assert all(parameter.grad is not None for parameter in trained_parameters(made.network).values())
    assert made.media(outputs).shape == (4, 1, 3, 8, 8)


@pytest.mark.parametrize("train", [LORA, {"kind": "full"}])
def test_what_was_trained_is_loaded_back(folder, train, tmp_path):
    """Merged by the pipeline and by this library, adapters by peft."""
    model = load(folder, train)
    before = logits(model).detach()
    for parameter in trained_parameters(model.network).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    expected = logits(model).detach()
    with model.reference():
        torch.testing.assert_close(logits(model), before)
    tensors = {name: value.detach().clone() for name, value in trained_parameters(model.network).items()}
    if train is LORA:
        model.save_lora(tmp_path / "lora", tensors)
        again = load(folder)
        again.network = PeftModel.from_pretrained(
            UVit2DModel.from_pretrained(folder, subfolder="transformer"), tmp_path / "lora"
        )
        torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)
    model.save_merged(tmp_path / "merged", tensors)
    assert {part.name for part in (tmp_path / "merged").iterdir()} == {part.name for part in folder.iterdir()}
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = AmusedPipeline.from_pretrained(tmp_path / "merged").transformer
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, model.network.state_dict()[name])


def test_random_weights_need_no_folder(folder):
    model = load(folder, random_init=True)
    assert logits(model).isfinite().all()
    assert model.decode(TOKENS.clamp(max=31)).shape == (1, 1, 3, 8, 8)


@pytest.mark.parametrize(
    ("wrong", "settings", "sentence"),
    [
        ({"mask": 40}, {}, "has mask_token_id 40, which the transformer's vocabulary of 40 tokens"),
        ({"codes": 16}, {}, "has 32 codes and its vqvae 16; they belong to different checkpoints"),
        ({}, {"num_frames": 5}, r"draws images; take 1, not 5"),
        ({}, {"height": 9}, r"model.height: 9 is no multiple of 2; the nearest is 8"),
        ({}, {"gradient_checkpointing": True}, r"model.gradient_checkpointing: .* has no use for it"),
    ],
)
def test_what_does_not_fit_is_refused(folder, tmp_path, wrong, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        load(write(tmp_path / "model", **wrong) if wrong else folder, **settings)


def test_a_missing_codec_is_refused(tmp_path):
    write(tmp_path / "model")
    (tmp_path / "model/vqvae/config.json").unlink()
    with pytest.raises(UserError, match=r"model.path: .*vqvae/config.json is no readable config.json"):
        load(tmp_path / "model")
