"""A LoRA to begin with: every key style gives the velocity that its matrices say, and what does not fit is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashgrpo.distributed.world import single_process
from flashgrpo.errors import UserError
from flashgrpo.models.load import load_model
from flashgrpo.models.lora import trained_parameters
from flashgrpo.models.settings import ModelConfig
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.types import Prompt
from tests.families import KINDS

RANK, ALPHA = 2, 3.0
LAYERS = {  # of block 1 of Wan: diffusers' name -> that of the released checkpoint
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_v": "cross_attn.v",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
TOLD = []
LORA = {"kind": "lora", "rank": RANK, "alpha": 4}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            KINDS[name].build().save_pretrained(made[name])
        return made[name]

    return folder


def load(folder, name="wan21", **settings):
    train = settings.pop("train", {"kind": "lora", "rank": RANK, "alpha": 4, "targets": TARGETS})
    config = KINDS[name].config(folder, train=train, **settings)
    return load_model(config, single_process(), seed=0, say=TOLD.append)


def velocity(model, timestep=500.0):
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    point = GridPoint(torch.tensor([timestep]), torch.tensor([timestep / 1000]).double(), torch.ones(1))
    condition = model.encode([Prompt("a red circle", {})]) if not model.takes_image else model.nothing()
    with torch.no_grad():
        return model.velocity(x, point, condition)


def matrices(network):
    """Layer -> (A, B) of `LAYERS` in block 1."""
    source, found = torch.Generator().manual_seed(1), {}
    for layer in LAYERS:
        out, width = network.get_submodule(f"blocks.1.{layer}").weight.shape
        found[layer] = torch.randn(RANK, width, generator=source), torch.randn(out, RANK, generator=source)
    return found


def diffusers_style(folder, pairs):
    tensors = {}
    for layer, (down, up) in pairs.items():
        tensors |= {f"transformer.blocks.1.{layer}.lora_{part}.weight": m for part, m in (("A", down), ("B", up))}
    settings = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA, "transformer.alpha_pattern": {}}
    save_file(tensors, folder / "lora.safetensors", {"format": "pt", "lora_adapter_metadata": json.dumps(settings)})
    return folder / "lora.safetensors", ALPHA / RANK


def comfyui_style(folder, pairs):
    tensors = {}
    for layer, (down, up) in pairs.items():
        name = f"diffusion_model.blocks.1.{LAYERS[layer]}"
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(ALPHA),
        }
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors", ALPHA / RANK


def musubi_style(folder, pairs):
    tensors = {}
    for layer, (down, up) in pairs.items():
        name = f"lora_unet_blocks_1_{LAYERS[layer].replace('.', '_')}"
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(ALPHA),
        }
    save_file(tensors, folder / "lora.safetensors", {"ss_network_alpha": "99"})
    return folder / "lora.safetensors", ALPHA / RANK


def ai_toolkit_style(folder, pairs):
    """Original names, peft's matrices, and no alpha, which then is the rank."""
    tensors = {}
    for layer, (down, up) in pairs.items():
        name = f"diffusion_model.blocks.1.{LAYERS[layer]}"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors", 1.0


def peft_style(folder, pairs):
    tensors = {}
    for layer, (down, up) in pairs.items():
        name = f"base_model.model.blocks.1.{layer}"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"r": RANK, "lora_alpha": ALPHA, "use_rslora": True, "alpha_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder, ALPHA / RANK**0.5


STYLES = [diffusers_style, comfyui_style, musubi_style, ai_toolkit_style, peft_style]


@pytest.mark.parametrize("style", STYLES)
def test_every_key_style_gives_the_velocity_of_its_matrices(style, folders, tmp_path):
    base = load(folders("wan21"), train={"kind": "full"})
    before, pairs = velocity(base), matrices(base.network)
    path, scale = style(tmp_path, pairs)
    with torch.no_grad():
        for layer, (down, up) in pairs.items():
            base.network.get_submodule(f"blocks.1.{layer}").weight += scale * up @ down
    wanted = velocity(base)
    assert not torch.allclose(wanted, before, atol=1e-2)
    further = load(folders("wan21"), adapters=str(path))
    assert TOLD[-1].endswith(f"rank 2, alpha / rank {scale:.4g}, on 8 layers")
    torch.testing.assert_close(velocity(further), wanted, rtol=1e-4, atol=1e-5)
    with further.reference():
        torch.testing.assert_close(velocity(further), wanted, rtol=1e-4, atol=1e-5)
    merged = load(folders("wan21"), adapters=str(path), merge_adapters=True)
    torch.testing.assert_close(velocity(merged), wanted, rtol=1e-4, atol=1e-5)
    assert not any(value.any() for name, value in trained_parameters(merged.network).items() if "lora_B" in name)
    assert further.identity != merged.identity != base.identity


def test_layers_outside_of_blocks_and_differences_that_are_zero(folders, tmp_path):
    """Files of ComfyUI's tools train embeddings, too: their names are converted by diffusers itself."""
    base = load(folders("wan21"), train={"kind": "full"})
    embedder = base.network.condition_embedder.time_embedder.linear_1
    down, up = torch.randn(RANK, embedder.in_features), torch.randn(embedder.out_features, RANK)
    name = "diffusion_model.time_embedding.0"
    query = base.network.blocks[0].attn1.to_q
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    tensors |= {
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.zeros(RANK, query.in_features),
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight": torch.zeros(query.out_features, RANK),
        "diffusion_model.blocks.0.norm3.diff": torch.zeros(4),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    with torch.no_grad():
        embedder.weight += up @ down
    merged = load(folders("wan21"), adapters=str(tmp_path / "lora.safetensors"), merge_adapters=True)
    torch.testing.assert_close(velocity(merged), velocity(base), rtol=1e-4, atol=1e-5)
    tensors["diffusion_model.blocks.0.norm3.diff"] += 1
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"keys that fit no linear layer of this network: .*norm3.diff"):
        load(folders("wan21"), adapters=str(tmp_path / "lora.safetensors"), merge_adapters=True)


@pytest.mark.parametrize("key", ["diff_b", "lora_B.bias"])
def test_biases_are_merged_and_are_not_trained_on(key, folders, tmp_path):
    """As files of distilled models have them (LightX2V's of Wan 2.1)."""
    base = load(folders("wan21"), train={"kind": "full"})
    path, _ = ai_toolkit_style(tmp_path, pairs := matrices(base.network))
    bias = torch.randn(base.network.blocks[1].attn1.to_q.bias.shape)
    tensors = load_file(path) | {f"{Q}.{key}": bias, "diffusion_model.blocks.1.self_attn.k.diff_b": 0 * bias}
    save_file(tensors | {"diffusion_model.blocks.1.self_attn.norm_q.diff": 0 * bias}, path)
    with torch.no_grad():
        base.network.blocks[1].attn1.to_q.bias += bias
        for layer, (down, up) in pairs.items():
            base.network.get_submodule(f"blocks.1.{layer}").weight += up @ down
    merged = load(folders("wan21"), adapters=str(path), merge_adapters=True)
    torch.testing.assert_close(velocity(merged), velocity(base), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"changes biases, of attn1\.to_q, which adapters that are trained do not have"):
        load(folders("wan21"), adapters=str(path))
    save_file(tensors | {f"{Q}.{key}": bias[:-1]}, path)
    with pytest.raises(UserError, match=r"has a bias for blocks\.1\.attn1\.to_q that does not fit; it is for another"):
        load(folders("wan21"), adapters=str(path), merge_adapters=True)


@pytest.mark.parametrize("style", ["diffusers", "comfyui"])
@pytest.mark.parametrize("name", ["wan21", "wan21-image", "wan22-a14b", "wan22-a14b-image", "ltx"])
def test_what_was_exported_begins_a_run_with_the_same_velocity(name, style, folders, tmp_path):
    train = {"kind": "lora", "rank": 3, "alpha": 5}
    trained = load(folders(name), name, train=train)
    source = torch.Generator().manual_seed(2)
    for parameter in trained_parameters(trained.network).values():
        parameter.data += torch.randn(parameter.shape, generator=source)
    trained.save_lora(tmp_path / "lora", trained_parameters(trained.network), style)
    higher = load(folders(name), name, train={"kind": "lora", "rank": 4, "alpha": 4}, adapters=str(tmp_path / "lora"))
    for timestep in (950.0, 300.0):
        wanted = velocity(trained, timestep)
        torch.testing.assert_close(velocity(higher, timestep), wanted, rtol=1e-4, atol=1e-5)
    at_start = velocity(higher)
    for parameter in trained_parameters(higher.network).values():
        parameter.data += 0.1
    assert not torch.allclose(velocity(higher), at_start, atol=1e-3)
    with higher.reference():
        torch.testing.assert_close(velocity(higher), at_start, rtol=0, atol=0)
    assert not torch.allclose(velocity(higher), at_start, atol=1e-3)


def test_what_a_merged_start_exports_is_what_was_trained_on_top(folders, tmp_path):
    path, _ = ai_toolkit_style(tmp_path, matrices(load(folders("wan21")).network))
    merged = load(folders("wan21"), adapters=str(path), merge_adapters=True)
    for name, parameter in trained_parameters(merged.network).items():
        parameter.data += 0.1 if "lora_B" in name else 0.0
    [file] = merged.save_lora(tmp_path / "lora", trained_parameters(merged.network))
    assert not [key for key in load_file(tmp_path / "lora" / file) if "base" in key]
    x, text = torch.randn(1, *merged.latent_shape), merged.encode([Prompt("a red circle", {})]).tensors["text"]
    call = {"hidden_states": x, "timestep": torch.tensor([500.0]), "encoder_hidden_states": text, "return_dict": False}
    pipeline = KINDS["wan21"].open(folders("wan21"))
    pipeline.load_lora_weights(str(path))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(str(tmp_path / "lora"))
    with torch.no_grad():
        torch.testing.assert_close(pipeline.transformer(**call)[0], merged.network(**call)[0], rtol=1e-4, atol=1e-5)


def test_layers_whose_results_are_dropped_are_passed_over(folders, tmp_path):
    """What others train on Stable Diffusion 3.5 has adapters on the last block's queries of the text, too."""
    model = load(folders("sd35"), "sd35", train={"kind": "full"})
    layers = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.add_q_proj")
    source, tensors = torch.Generator().manual_seed(3), {}
    for name in layers:
        layer = model.network.get_submodule(name)
        for part, size in (("A", (RANK, layer.in_features)), ("B", (layer.out_features, RANK))):
            tensors[f"transformer.{name}.lora_{part}.weight"] = torch.randn(size, generator=source)
    save_file(tensors, tmp_path / "lora.safetensors")
    before, path = velocity(model), str(tmp_path / "lora.safetensors")
    merged = load(folders("sd35"), "sd35", train=LORA, adapters=path, merge_adapters=True)
    further = load(folders("sd35"), "sd35", train=LORA, adapters=path)
    torch.testing.assert_close(velocity(further), velocity(merged), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(velocity(further), before, atol=1e-3)


def test_layers_that_are_fused_in_the_released_checkpoint(folders, tmp_path):
    """Kohya's files for FLUX have one matrix for query, key and value; diffusers' converter cuts it."""
    model = load(folders("flux1-dev"), "flux1-dev", train={"kind": "full"})
    attention = model.network.transformer_blocks[0].attn
    width = attention.to_q.in_features
    down, up = torch.randn(RANK, width), torch.randn(3 * width, RANK)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
    save_file(tensors, tmp_path / "lora.safetensors")
    with torch.no_grad():
        for layer, part in zip((attention.to_q, attention.to_k, attention.to_v), up.chunk(3), strict=True):
            layer.weight += ALPHA / RANK * part @ down
    further = load(folders("flux1-dev"), "flux1-dev", train=LORA, adapters=str(tmp_path / "lora.safetensors"))
    torch.testing.assert_close(velocity(further), velocity(model), rtol=1e-4, atol=1e-4)


def rank_3(tensors):
    return {
        key: torch.cat([t, t[:1]] if "down" in key else [t, t[:, :1]], int("up" in key)) for key, t in tensors.items()
    }


Q = "diffusion_model.blocks.1.self_attn.q"


@pytest.mark.parametrize(
    ("change", "settings", "sentence"),
    [
        (rank_3, {}, r"has rank 3, which model\.train\.rank 2 has no room for; take model\.train\.rank=3 or more, or"),
        (lambda t: t, {"train": {"kind": "lora", "rank": 2, "targets": ["to_q"]}}, r"has adapters on attn1\.to_k"),
        (
            lambda t: {**t, "lora_te_text.alpha": torch.ones(())},
            {},
            r"1 of 17 keys that fit no linear layer .*lora_te_text",
        ),
        (lambda t: {**t, f"{Q}.dora_scale": torch.ones(1)}, {}, r"1 of 17 keys that fit no .*self_attn\.q\.dora_scale"),
        (lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_up.weight"}, {}, "only one of the two matrices of"),
        (
            lambda t: {k: v[:, :-1] if k == f"{Q}.lora_down.weight" else v for k, v in t.items()},
            {},
            "for another model",
        ),
        (
            lambda t: {k: v * float("nan") for k, v in t.items()},
            {},
            "has values that are not finite in diffusion_model",
        ),
        (lambda t: {}, {}, "0 of 0 keys that fit no linear layer of this network: it is empty"),
    ],
)
def test_what_does_not_fit_is_named(change, settings, sentence, folders, tmp_path):
    pairs = matrices(load(folders("wan21")).network)
    path, _ = comfyui_style(tmp_path, pairs)
    tensors = {key: value for key, value in load_file(path).items() if not key.endswith("alpha")}
    save_file({key: value.contiguous() for key, value in change(tensors).items()}, path)
    with pytest.raises(UserError, match=sentence) as error:
        load(folders("wan21"), adapters=str(path), **settings)
    assert str(path) in str(error.value)


def test_a_file_for_each_expert(folders, tmp_path):
    with pytest.raises(UserError, match=r"there is no file or folder .*lora"):
        load(folders("wan21"), adapters=str(tmp_path / "lora"))
    with pytest.raises(UserError, match="holds 0 safetensors files and should hold one; name it"):
        load(folders("wan21"), adapters=str(tmp_path))
    (tmp_path / "lora_high_noise.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"lora_high_noise.safetensors cannot be read as safetensors"):
        load(folders("wan21"), adapters=str(tmp_path))
    for path in (tmp_path, tmp_path / "lora_high_noise.safetensors"):
        with pytest.raises(UserError, match=r"this model has two experts, so .* one with 'high' and one with 'low'"):
            load(folders("wan22-a14b"), "wan22-a14b", adapters=str(path))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"merge_adapters": True}, r"model\.merge_adapters: there is nothing to merge"),
        ({"adapters": "a", "train": {"kind": "full"}}, r"model\.adapters: full training has none to go on with"),
    ],
)
def test_settings_that_say_nothing(settings, sentence):
    config = ModelConfig.model_validate({"path": "a", "height": 32, "width": 32, "num_frames": 1, **settings})
    with pytest.raises(ValueError, match=sentence):
        config.check(sharded=False)
