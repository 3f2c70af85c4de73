"""What any `VideoModel` has to do, asked of every supported kind of checkpoint, with tiny random weights.

The judge is diffusers: its own pipelines sample the same latents and frames, and its own loaders read what is exported.
"""

import copy
import inspect
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image

from flashgrpo.distributed.world import World, single_process
from flashgrpo.errors import UserError
from flashgrpo.learning.optim import Optimizer
from flashgrpo.learning.settings import OptimConfig
from flashgrpo.learning.update import policy_update
from flashgrpo.models.load import META, load_model, weightless
from flashgrpo.models.lora import trained_parameters, weights_replaced
from flashgrpo.presets import DIFFUSION_NFT, FLASH_GRPO
from flashgrpo.processes.flow.model import GridPoint, VideoModel
from flashgrpo.processes.flow.process import FlowProcess
from flashgrpo.processes.flow.rollout import noise_of
from flashgrpo.processes.flow.schedule import SigmaGrid
from flashgrpo.processes.flow.settings import RolloutConfig, SamplingConfig
from flashgrpo.processes.flow.solvers import DpmSolver, Euler, Solver, UniPC
from flashgrpo.types import Prompt, PromptGroup, Sample
from flashgrpo.video import cropped, open_image
from tests.families import KINDS, UNIPC, Kind

WORLD = single_process()
TEXTS = ["a red circle moving left slowly", "a blue square moving up quickly"]
SCALE = 4.0


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request):
    return KINDS[request.param]


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    """The kind's checkpoint on disk, beside an image."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    kind.build().save_pretrained(folder)
    picture = Image.new("RGB", (90, 70), "darkgreen")
    picture.paste("orange", (20, 20, 50, 60))
    picture.save(folder.parent / "first.png")
    picture.rotate(180).save(folder.parent / "last.png")
    return folder


@pytest.fixture(scope="module")
def prompts(kind, folder):
    return [Prompt(text, kind.images(folder.parent)) for text in TEXTS]


@pytest.fixture
def model(kind, folder, prompts) -> VideoModel:
    return load_model(kind.config(folder), WORLD, 0, prompts)


def noise(model: VideoModel, rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


def moments(grid: SigmaGrid, steps: list[int], scale: float) -> GridPoint:
    k = torch.tensor(steps)
    return GridPoint(grid.timesteps[k], grid.sigmas[k], torch.full((len(steps),), scale))


def process_of(model: VideoModel, kind: Kind, solver: Solver, world: World = WORLD, **rollout: object) -> FlowProcess:
    """Flash-GRPO's draws of six steps, replayed two units at a time; evaluation has the same steps and solver."""
    sizes = {"prompts": 2, "group_size": 2, "num_steps": 6}
    scale = 1 if model.guidance == "none" else SCALE
    guidance = {"guidance_scale": scale, "guidance_scale_2": kind.guidance_scale_2}
    settings = RolloutConfig(**sizes, **guidance, solver=solver, **rollout)
    sampling = SamplingConfig(num_steps=6, solver=solver)
    return FlowProcess(model, FLASH_GRPO.explore, FLASH_GRPO.score, settings, sampling, micro_batch=2, world=world)


def two_each(prompts: list[Prompt]) -> list[Sample]:
    """A group of two samples of each prompt."""
    groups = [PromptGroup(0, number, prompt, 2) for number, prompt in enumerate(prompts)]
    return [Sample(group, member) for group in groups for member in range(2)]


def nobody(rows: torch.Tensor, outputs: torch.Tensor) -> None:
    """Leave aside what was drawn."""


def perturb(model: VideoModel) -> dict[str, torch.Tensor]:
    """Move what is trained off its start; returns the values."""
    source = torch.Generator().manual_seed(1)
    parameters = trained_parameters(model.network)
    for parameter in parameters.values():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=source)
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def test_it_is_a_video_model(model, kind, prompts):
    assert isinstance(model, VideoModel)
    grid = model.grid(4)
    v = model.velocity(noise(model, 2), moments(grid, [0, 3], SCALE), model.encode(prompts))
    assert v.shape == (2, *model.latent_shape)
    assert v.dtype == torch.float32
    video = model.decode(noise(model, 2))
    assert video.shape == (2, kind.num_frames, 3, kind.height, kind.width)
    assert 0 <= float(video.min()) < float(video.max()) <= 1
    for frames in {1, 2, 5} if kind.num_frames > 1 else {1}:
        beginning = model.decode(noise(model, 2), frames)  # where fewer frames may round otherwise in the last bit
        torch.testing.assert_close(beginning, video[:, :frames], rtol=0, atol=1e-6)
    assert model.token_counts(["a red circle"]) == [4]


def test_guidance_goes_from_the_negative_prompt_through_the_text(model, kind, prompts):
    if not kind.linear:
        pytest.skip("its own test says what its guidance is")
    condition, x, grid = model.encode(prompts), noise(model, 2), model.grid(4)
    v = [model.velocity(x, moments(grid, [1, 3], scale), condition).detach() for scale in (1.0, 2.0, 3.0)]
    assert not torch.allclose(v[0], v[1], atol=1e-4)
    torch.testing.assert_close(v[2] - v[1], v[1] - v[0], rtol=1e-3, atol=1e-5)
    mixed = GridPoint(grid.timesteps[[1, 3]], grid.sigmas[[1, 3]], torch.tensor([1.0, 3.0]))
    both = model.velocity(x, mixed, condition)
    torch.testing.assert_close(both, torch.stack([v[0][0], v[2][1]]), rtol=1e-4, atol=1e-5)


def test_rows_do_not_see_each_other(model, prompts):
    condition, x, point = model.encode(prompts), noise(model, 2), moments(model.grid(4), [3, 0], SCALE)
    together = model.velocity(x, point, condition)
    for row in range(2):
        rows = torch.tensor([row])
        torch.testing.assert_close(
            model.velocity(x[rows], point[rows], condition[rows])[0], together[row], rtol=1e-4, atol=1e-5
        )


def test_loading_twice_gives_the_same_model(model, kind, folder, prompts):
    again = load_model(kind.config(folder), WORLD, 0, prompts)
    point = moments(model.grid(4), [0, 3], SCALE)
    v = [m.velocity(noise(m, 2), point, m.encode(prompts)) for m in (model, again)]
    assert torch.equal(*v)
    assert all(torch.equal(a, b) for a, b in zip(model.network.parameters(), again.network.parameters(), strict=True))


def test_prompts_are_encoded_once_and_no_encoder_stays(model, kind, folder, prompts, monkeypatch):
    assert getattr(model.pipeline, "text_encoder", None) is None
    assert getattr(model.pipeline, "image_encoder", None) is None
    rows = model.encode([prompts[0], prompts[1], prompts[0]]).tensors
    for tensor in rows.values():
        assert torch.equal(tensor[0], tensor[2])
    assert not torch.equal(rows["text"][0], rows["text"][1])
    with monkeypatch.context() as patch:
        for method in ("encode_text", "encode_image"):
            patch.setattr(type(model), method, None)  # a call would fail
        again = load_model(kind.config(folder), WORLD, 0, prompts)
        assert torch.equal(again.encode(prompts).tensors["text"], rows["text"][:2])
    new = model.encode([Prompt("a green circle", prompts[0].columns)]).tensors["text"]
    assert not torch.equal(new, rows["text"][:1])


def test_every_targeted_layer_is_trained_by_the_steps_of_its_expert(model, prompts):
    perturb(model)
    condition, grid, received = model.encode(prompts), model.grid(6), set()
    everything = trained_parameters(model.network)
    assert all("lora" in name for name in everything)
    for step in range(grid.num_steps):
        x = noise(model, 2)
        model.velocity(x, moments(grid, [step, step], SCALE), condition).square().mean().backward()
        own = {id(parameter) for parameter in model.expert(float(grid.timesteps[step])).parameters()}
        for name, parameter in everything.items():
            has = parameter.grad is not None and bool(parameter.grad.any())
            assert has == (id(parameter) in own), name
            received |= {name} if has else set()
            parameter.grad = None
    assert received == set(everything)


def test_the_reference_is_the_model_before_training(model, prompts):
    condition, x, point = model.encode(prompts), noise(model, 2), moments(model.grid(4), [0, 3], SCALE)
    base = model.velocity(x, point, condition).detach()
    perturb(model)
    assert not torch.allclose(model.velocity(x, point, condition), base, atol=1e-4)
    with model.reference():
        assert torch.equal(model.velocity(x, point, condition), base)


def test_idle_calls_reach_every_expert(model):
    grid = model.grid(6)
    for step in range(grid.num_steps):
        assert model.idle(moments(grid, [step], 1.0)).requires_grad


@pytest.mark.parametrize("solver", [Euler(), UniPC()], ids=["euler", "unipc"])
def test_sampling_equals_the_pipeline(model, kind, folder, prompts, solver, record_property):
    """Our loop against the pipeline's own `__call__`, from the same noise and the same embeddings."""
    if not kind.unipc and solver.kind == "unipc":
        pytest.skip("its pipeline cannot call UniPC")
    perturb(model)  # the pipeline gets the adapters through its own loader
    pipeline = kind.open(folder)
    if solver.kind == "unipc":
        pipeline.scheduler = UniPCMultistepScheduler(**UNIPC, use_dynamic_shifting=kind.dynamic)
    elif not kind.dynamic:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    model.pipeline.scheduler = copy.deepcopy(pipeline.scheduler)
    load_adapters(model, pipeline, folder.parent / "lora", "diffusers")

    noise = (3, "noise", 0)
    start = noise_of(model, [noise])
    ours = process_of(model, kind, solver).sample(prompts[:1], [noise], nobody)
    call = {"height": kind.height, "width": kind.width, "num_frames": kind.num_frames, "negative_prompt": ""}
    call["max_sequence_length"] = model.config.max_sequence_length
    call |= {"num_inference_steps": 6, "guidance_scale": SCALE if model.guidance != "none" else 1}
    if kind.guidance_scale_2:
        call["guidance_scale_2"] = kind.guidance_scale_2
    for name, image in kind.images(folder.parent).items():
        picture = cropped(open_image(image), kind.width, kind.height)  # theirs stretches
        if kind.num_frames == 1:  # pipelines of images take it at the size that it has
            picture = picture.resize((kind.width, kind.height), Image.Resampling.LANCZOS)
        call[name] = picture
    call |= kind.call(model)
    known = inspect.signature(pipeline.__call__).parameters
    call = {name: value for name, value in call.items() if name in known}
    call |= {"prompt": TEXTS[0], **kind.to_pipeline(model, start)}
    theirs = kind.from_pipeline(model, pipeline(**call, output_type="latent"))
    record_property("latents", float((ours - theirs).abs().max()))  # for docs/families.md
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)
    video, *sound = pipeline(**call, output_type="pt", return_dict=False)
    frames = model.decode(ours), video.view(1, -1, *video.shape[-3:])
    assert (model.sample_rate is None) == (not sound)
    if sound:
        torch.testing.assert_close(model.decode_sound(ours), sound[0], rtol=1e-3, atol=1e-3)
    record_property("pixels", float((frames[0] - frames[1]).abs().max()))
    torch.testing.assert_close(*frames, rtol=1e-3, atol=1e-3)


def load_adapters(model: VideoModel, pipeline: object, folder: Path, style: str) -> list[str]:
    """As the model card says: by the pipeline, or where that cannot, by its transformer."""
    tensors = {name: parameter.detach() for name, parameter in trained_parameters(model.network).items()}
    files = model.save_lora(folder, tensors, style)
    for number, file in enumerate(files):
        second = {"load_into_transformer_2": True} if number else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = hasattr(pipeline, "load_lora_weights")
            load = pipeline.load_lora_weights if whole else pipeline.transformer.load_lora_adapter
            load(folder, weight_name=file, adapter_name=f"a{number}", **second)
    return files


@pytest.mark.parametrize("style", ["diffusers", "comfyui"])
def test_diffusers_loads_the_adapters(model, kind, folder, prompts, style, tmp_path):
    perturb(model)
    if style == "comfyui" and not kind.comfyui:
        with pytest.raises(UserError, match="has no name there; use diffusers or merged"):
            load_adapters(model, None, tmp_path, style)
        return
    pipeline = kind.open(folder)
    files = load_adapters(model, pipeline, tmp_path, style)
    experts = [name for name in ("transformer", "transformer_2") if getattr(pipeline, name, None) is not None]
    assert len(files) == len(experts)
    grid = model.grid(6)
    condition, x, point = model.encode(prompts), noise(model, 2), moments(grid, [0, 5], SCALE)
    tuned = model.velocity(x, point, condition)
    with model.reference():
        base = model.velocity(x, point, condition)
    assert not torch.allclose(tuned, base, atol=1e-3)
    model.experts = {name: getattr(pipeline, name) for name in experts}  # the same calls through what was loaded
    model._residence._parts.update(model.experts)
    torch.testing.assert_close(model.velocity(x, point, condition), tuned, rtol=1e-4, atol=1e-5)


def test_a_merged_pipeline_is_the_tuned_model(model, kind, prompts, tmp_path):
    tuned_weights = perturb(model)
    condition, x, point = model.encode(prompts), noise(model, 2), moments(model.grid(6), [0, 5], SCALE)
    tuned = model.velocity(x, point, condition).detach()
    model.save_merged(tmp_path / "merged", tuned_weights)
    merged = load_model(kind.config(tmp_path / "merged"), WORLD, 0, prompts)
    torch.testing.assert_close(merged.velocity(x, point, condition), tuned, rtol=1e-3, atol=1e-4)
    assert kind.open(tmp_path / "merged").text_encoder is not None


@pytest.mark.parametrize(
    ("algorithm", "solver", "offload"),
    [(FLASH_GRPO, Euler(), False), (FLASH_GRPO, UniPC(), True), (DIFFUSION_NFT, DpmSolver(), False)],
    ids=["euler", "unipc-offload", "nft-dpm"],
)
def test_one_update(kind, folder, prompts, algorithm, solver, offload):
    """Rollout, replay and optimizer step; the first ratio is 1 bit for bit, and the weights move."""
    model = load_model(kind.config(folder, offload=offload, gradient_checkpointing=True), WORLD, 0, prompts)
    perturb(model)
    process = process_of(model, kind, solver, micro_batch=4, retain=False)
    process = process.exploring(algorithm.explore, algorithm.score)
    latents, record = process.draw(two_each(prompts), 0, nobody, 2, algorithm.objective.columns)
    assert latents.isfinite().all()
    before = {name: p.detach().clone() for name, p in trained_parameters(model.network).items()}
    optimizer = Optimizer(trained_parameters(model.network), OptimConfig(lr=1e-2, micro_batch=2), WORLD)
    record = replace(record, advantage=torch.tensor([1.0, -1.0, 0.5, -0.5])[record.sample])
    metrics = policy_update(process, algorithm.objective, optimizer, record, optimizer.config, WORLD)
    assert metrics["drift"] == 0
    assert metrics["grad_norm"] > 0
    with weights_replaced(model.network, before):
        assert model.decode(latents[:1]).shape[1] == kind.num_frames


def test_a_rollout_reads_no_values(kind, folder, prompts, monkeypatch):
    """On the meta device there are no values: whoever asks for one, as a GPU would have to be waited for, fails.

    Copies from the host's memory it does not see: diffusers' UniPC makes a few of single numbers at each step.
    """
    model = weightless(kind.config(folder))
    monkeypatch.setattr(model, "encode", lambda wanted: model.nothing()[torch.zeros(len(wanted), dtype=torch.int64)])
    process = process_of(model, kind, UniPC(), World(META), micro_batch=3, deterministic_steps=3, retain=True)
    latents, record = process.draw(two_each(prompts), 0, nobody)
    assert latents.is_meta
    assert record.state.kept
    model.decode(latents, 5)
    with pytest.raises(RuntimeError, match="meta"):
        latents.sum().item()


def test_a_tokenizer_that_is_a_sentencepiece_model(tmp_path):
    """As LTX-Video ships its own."""
    import sentencepiece
    from transformers import T5Tokenizer

    (tmp_path / "text.txt").write_text("\n".join(TEXTS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "spiece"), vocab_size=30, minloglevel=2
    )
    tokenizer = T5Tokenizer.from_pretrained(tmp_path)
    assert len(tokenizer("a red circle").input_ids) > 3
