"""The model card of an export: what it is, what it was trained on, what came of it, and a program that uses it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flashgrpo.config import RunConfig
from flashgrpo.config.reading import write_yaml
from flashgrpo.formats import Numbers, called
from flashgrpo.models.settings import Lora
from flashgrpo.process import PipelineCall
from flashgrpo.run.progress import describe

Format = Literal["diffusers", "comfyui", "merged"]
Library = Literal["diffusers", "peft"] | None
CallOf = Callable[[Mapping[str, Any]], PipelineCall | None]


NO_PIPELINE = """\
Diffusers has no pipeline that draws as this model was trained to, block by block from a cache; `flashgrpo sample`
does, with the run that this comes from. Names and layout are those of diffusers, for code that streams with its
networks."""
WRITES_SOUND = [
    'with wave.open("sound.wav", "wb") as file:',
    '    file.setparams((sound.shape[1], 2, pipe.vocoder.config.output_sampling_rate, 0, "NONE", ""))',
    "    file.writeframes((sound[0].float().clamp(-1, 1).T * 32767).short().cpu().numpy().tobytes())",
]
FRAMES = {"image": "first-frame.png", "last_image": "last-frame.png"}


class Shown(NamedTuple):
    """A prompt, and files of the export with what the base model made of it and what the tuned one did."""

    prompt: str
    base: str
    tuned: str


def model_card(
    config: RunConfig,
    format: Format,
    files: Sequence[str],
    update: int,
    evaluated: dict[str, Any] | None,
    image: bool,
    library: Library = "diffusers",
    call_of: CallOf = PipelineCall,
    shown: Sequence[Shown] = (),
) -> str:
    """Write what a reader of the files needs to know; it names no folder of the machine that trained.

    Args:
        files: of the adapters, none of a whole pipeline.
        evaluated: the line of evaluations.jsonl that tells of this update.
        image: whether the model starts from one.
        library: that loads the files; None where only the code of the base model does.
        call_of: see `Process.pipeline_call`.
        shown: samples that lie beside the card.
    """
    train = config.model.train
    what = f"LoRA, rank {train.rank}, alpha {train.alpha}" if isinstance(train, Lora) else "every weight"
    rewards = [f"{code(name)} ({_calls(reward.call)})" for name, reward in config.rewards.items() if not reward.watched]
    pixels, frames = f"{config.model.width} x {config.model.height}", config.model.num_frames
    size = {"Images": pixels} if frames == 1 else {"Videos": f"{pixels}, {frames} frames"}
    size = {"Texts": f"{config.model.length} tokens"} if config.model.length else size
    facts = {
        "Base": code(public(config.model.path)),
        **_beginning(config, format),
        "Trained": f"{what}; {update} updates of {config.rollout.prompts} x {config.rollout.group_size} samples",
        **size,
        "Prompts": code(public(config.prompts.train)),
        "Reward": ", ".join(rewards),
        **config.rollout.facts(),
        "Seed": str(config.seed),
    }
    parts = [
        f"---\n{write_yaml(_metadata(config, format, image, library) | _widget(shown))}---",
        "# Aligned with Flash-GRPO",
        _result(evaluated),
        "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        *([_samples(shown, update)] if shown else []),
        "## Use",
        _use(config, format, files, library, call_of),
        "## Recipe",
        f"```yaml\n{write_yaml(_recipe(config))}```",
    ]
    return "\n\n".join(parts) + "\n"


def _samples(shown: Sequence[Shown], update: int) -> str:
    """Write a table of samples; the hub plays the videos in it."""

    def cell(file: str) -> str:
        if file.endswith(".mp4"):
            return f'<video src="{file}" width="240" autoplay loop muted playsinline controls></video>'
        return f"![]({file})" if file.endswith(".png") else f"[text]({file})"

    said = "Prompts of the evaluation in the order of their file, not chosen by result; both from the same noise."
    prompts = [code(one.prompt).replace("|", "\\|") for one in shown]
    lines = [f"| {p} | {cell(one.base)} | {cell(one.tuned)} |" for p, one in zip(prompts, shown, strict=True)]
    return "\n".join(
        ["## Samples\n", f"{said}\n", f"| prompt | base | after update {update} |", "|---|---|---|", *lines]
    )


def _widget(shown: Sequence[Shown]) -> dict[str, Any]:
    """Return the entry of the front matter by which the hub shows samples on the model's page."""
    seen = [one for one in shown if not one.tuned.endswith(".txt")]
    return {"widget": [{"text": one.prompt, "output": {"url": one.tuned}} for one in seen]} if seen else {}


def _recipe(config: RunConfig) -> dict[str, Any]:
    """Return the settings that the result depends on, without the folders of this machine."""

    def shown(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shown(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [shown(entry) for entry in value]
        return ", ".join(public(one.strip()) for one in value.split(",")) if _is_local(value) else value

    settings = config.model_dump(mode="json", exclude={"out", "tracking", "checkpoint", "parallel"})
    return {key: shown(entry) for key, entry in settings.items()}


def _is_local(value: Any) -> bool:
    begins = ("/", "http://", "https://", "datasets:/")
    return isinstance(value, str) and value.startswith(begins)


def _beginning(config: RunConfig, format: Format) -> dict[str, str]:
    """Return which adapters the run began with: those of an export are these, trained further, or go on top of them."""
    if config.model.adapters is None:
        return {}
    merged = ", merged before training" if config.model.merge_adapters else ", trained further"
    first = ": load them first" if config.model.merge_adapters and format != "merged" else ""
    return {"Began with": f"the adapters {code(public(config.model.adapters))}{merged}{first}"}


def code(text: str) -> str:
    """Return a text as one line of Markdown that shows it letter by letter: a backtick or a line break is escaped."""
    plain = text.isprintable() and "`" not in text and text == text.strip()
    return f"`{text}`" if plain else "`" + repr(text).replace("`", "\\x60") + "`"


def literal(text: str) -> str:
    """Return a text as Python has it, in double quotes where nothing in it has to be escaped."""
    return f'"{text}"' if text.isprintable() and not {*'\\"'} & {*text} else repr(text)


def _calls(call: str) -> str:
    """Return what a reward calls, one or several with commas, without the folders of this machine."""
    return ", ".join(code(public(one.strip())) for one in call.split(","))


def public(text: str) -> str:
    """Return a path without the folders of this machine; what ships or lies on a hub stays."""
    kind, colon, name = text.partition(":") if text.startswith("datasets:") else ("", "", text)
    if name.startswith(("http://", "https://")):
        return "a reward server"
    return f"{kind}{colon}{Path(name).name if Path(name).is_absolute() else name}"


def _metadata(config: RunConfig, format: Format, image: bool, library: Library) -> dict[str, Any]:
    """Return the front matter that the hub reads."""
    task = f"{'image' if image else 'text'}-to-{'image' if config.model.num_frames == 1 else 'video'}"
    task = "text-generation" if config.model.length else task
    lora = ["lora"] if isinstance(config.model.train, Lora) else []
    tags = [task, *([library] if library else []), *lora, "flash-grpo", "grpo", "reinforcement-learning"]
    return {
        "base_model": public(config.model.path),
        "base_model_relation": "finetune" if format == "merged" else "adapter",
        **({"library_name": library} if library else {}),
        "pipeline_tag": task,
        "tags": tags,
    }


def _use(config: RunConfig, format: Format, files: Sequence[str], library: Library, call_of: CallOf) -> str:
    if format == "comfyui":
        return _in_comfyui(files)
    if library == "diffusers":
        call = call_of(_evaluation(config))
        return NO_PIPELINE if call is None else f"```python\n{_program(config, files, call)}```"
    if library == "peft":
        base = code(public(config.model.path))
        return f"With `network`, loaded by the code of {base}:\n\n```python\n{_with_peft(files)}```"
    return f"The folder is laid out as that of {code(public(config.model.path))} and is loaded by the same code."


def _with_peft(files: Sequence[str]) -> str:
    """Write how peft loads the adapters of an export; those in a folder of their own go by its name."""
    names = [Path(file).parent.name for file in files if Path(file).name == "adapter_config.json"]
    given = [f'"{name}", adapter_name="{name}"' if name else '"."' for name in names]
    lines = ["from peft import PeftModel", "", f"network = PeftModel.from_pretrained(network, {given[0]})"]
    lines += [f"network.load_adapter({one})" for one in given[1:]]
    lines += [f'network.set_adapter("{names[-1]}")  # what computes from here on'] if len(names) > 1 else []
    return "\n".join(lines) + "\n"


def _result(evaluated: dict[str, Any] | None) -> str:
    if not evaluated:
        return "This checkpoint was not evaluated."
    said = describe(evaluated)
    result = f"{said[:1].upper()}{said[1:]}; {len(evaluated['samples'])} {called(evaluated)} samples, paired by noise."
    watched = []
    for name, value in evaluated["watched"].items():
        change, interval = value - evaluated["base_watched"][name], evaluated["watched_intervals"].get(name)
        watched.append(f"{name} {Numbers.of({'difference': change, 'interval': interval}).signed(change)}")
    return result + (f" Watched and never trained on: {', '.join(watched)}." if watched else "")


def _in_comfyui(files: Sequence[str]) -> str:
    """Write a line for each file; the second of two is the low-noise expert's."""
    return "\n".join(f"- LoraLoaderModelOnly on `{file}`, strength 1" for file in files)


def _loads_merged(config: RunConfig, files: Sequence[str], loader: str) -> list[str]:
    """Write the lines that add the adapters which a run began with and merged; a whole pipeline has them in it."""
    if config.model.adapters is None or not config.model.merge_adapters or not files:
        return []
    where = public(config.model.adapters)
    if len(files) > 1:  # each expert's file has a name of its own
        return [f"# here the adapters of {code(where)} are to be loaded, and fused, on both transformers"]
    holder, _, load = loader.rpartition(".")
    unload = "unload_lora_weights" if load == "load_lora_weights" else "unload_lora"
    return [f"{loader}({literal(where)})", f"{holder}.fuse_lora()", f"{holder}.{unload}()"]


def _evaluation(config: RunConfig) -> dict[str, Any]:
    """Return what a pipeline is called with to draw as an evaluation does, beside the prompt."""
    return {
        **{"height": config.model.height, "width": config.model.width, "num_frames": config.model.num_frames},
        **config.evaluation.pipeline_arguments(config.rollout),
        **({"negative_prompt": config.model.negative_prompt} if config.model.negative_prompt else {}),
        "max_sequence_length": config.model.max_sequence_length,
    }


def _program(config: RunConfig, files: Sequence[str], call: PipelineCall) -> str:
    """Write a program that runs in the folder of the export."""
    base, frames = public(config.model.path), config.model.num_frames
    shipped, local = base.startswith("flashgrpo:"), Path(config.model.path).is_absolute()
    where = f"resolve_path({literal(base)})" if shipped else literal(base)
    note = "  # the folder of the base model" if local else ""
    second = ["", ", load_into_transformer_2=True"]
    loader = "pipe.load_lora_weights" if call.loads_adapters else "pipe.transformer.load_lora_adapter"
    begins = _loads_merged(config, files, loader)
    loads = [f'{loader}(".", weight_name="{file}"{more})' for file, more in zip(files, second, strict=False)]
    sets = [f"pipe.{name} = {value}" for name, value in call.attributes.items()]
    given = {
        "prompt": '"A prompt like those it was trained on"',
        **{name: f'load_image("{FRAMES[name]}")' for name in call.images},
        **{name: literal(one) if isinstance(one, str) else one for name, one in call.arguments.items()},
    }
    if frames == 1:
        result = "frames[0][0]" if "num_frames" in given else "images[0]"
        given["output_type"] = '"pil"'
        save = ["image = pipe(", f").{result}", 'image.save("image.png")']
    else:
        save = ["video = pipe(", ").frames[0]", f'export_to_video(video, "video.mp4", fps={config.model.fps:g})']
    if call.sounds:
        save = ["video, sound = pipe(", ")", save[2].replace("(video", "(video[0]"), *WRITES_SOUND]
        given["return_dict"] = False
    helpers = [*(["export_to_video"] if frames > 1 else []), *(["load_image"] if call.images else [])]
    lines = [
        *(["import wave", ""] if call.sounds else []),
        "import torch",
        f"from diffusers import {call.pipeline}",
        *([f"from diffusers.utils import {', '.join(helpers)}"] if helpers else []),
        *(["from flashgrpo.files import resolve_path"] if shipped and files else []),
        "",
        f"pipe = {call.pipeline}.from_pretrained({where}, dtype=torch.bfloat16){note}"
        if files
        else f'pipe = {call.pipeline}.from_pretrained(".", dtype=torch.bfloat16)',
        *begins,
        *loads,
        *sets,
        "if torch.accelerator.is_available():",
        "    pipe.to(torch.accelerator.current_accelerator())",
        save[0],
        *(f"    {name}={value}," for name, value in given.items()),
        *save[1:],
    ]
    return "\n".join(lines) + "\n"
