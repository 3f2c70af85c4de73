"""Getting the result out: adapters for diffusers and ComfyUI, or a merged pipeline, with a model card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashgrpo.assembly import make_process
from flashgrpo.card import Format, Library, Shown, model_card
from flashgrpo.distributed.world import single_process
from flashgrpo.errors import UserError, first_line
from flashgrpo.files import read_object, write_aside
from flashgrpo.models.settings import Lora
from flashgrpo.run import checkpoint
from flashgrpo.run.directory import RunDirectory
from flashgrpo.run.progress import Reporter

MOST_SHOWN = 4  # pairs of samples beside a model card


def export(
    run: Path, format: Format = "diffusers", out: Path | None = None, checkpoint_update: int | None = None
) -> Path:
    """Write the averaged weights of a checkpoint, the best by default, in a format that others load.

    - `diffusers`: adapters for `pipe.load_lora_weights(folder)`.
    - `comfyui`: the same under the original names of the family's layers, which ComfyUI (and diffusers) reads.
    - `merged`: a whole pipeline folder for `from_pretrained`; the only one for a fully trained model.

    Returns:
        The folder, `RUN/export/FORMAT` by default; its README.md is a model card.

    Raises:
        UserError: no run or checkpoint, adapters asked of a fully trained model, or a folder that is not empty.
    """
    directory, config = RunDirectory.existing(run)
    if format != "merged" and not isinstance(config.model.train, Lora):
        raise UserError(f"--format {format}: {run} trained every weight, so there are no adapters; use --format merged")
    folder = out or run / "export" / format
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} exists and is not empty; choose another folder")
    update = directory.choose_checkpoint(checkpoint_update, Reporter().warn)
    averaged = checkpoint.load(directory.checkpoints, update, kinds=["ema"])["ema"]
    config = config.model_copy(update={"model": config.model.plain()})
    process = make_process(config, single_process(computes=False), ())
    directory.check_model(process.identity)
    with write_aside(folder) as aside:
        aside.mkdir()
        if format == "merged":
            process.save_merged(aside, averaged)
            files = list[str]()
        else:
            files = process.save_lora(aside, averaged, style=format)
        told = evaluated(directory, update)
        library, shown = library_of(aside, files), copy_samples(directory, update, aside)
        card = model_card(
            config, format, files, update, told, process.takes_image, library, process.pipeline_call, shown
        )
        (aside / "README.md").write_text(card, encoding="utf-8")
    return folder


def published(
    run: Path, format: Format, out: Path | None, checkpoint_update: int | None, repository: str | None
) -> list[str]:
    """Export, and upload the export where a repository is given; returns the folder and the address."""
    if repository is not None:
        check_repository(repository)
    folder = export(run, format, out, checkpoint_update)
    return [str(folder), *([push(folder, repository)] if repository is not None else [])]


def push(folder: Path, name: str) -> str:
    """Upload an export to the Hugging Face hub, into a private repository where there is none of that name.

    Args:
        name: OWNER/NAME.

    Returns:
        The address of the repository.

    Raises:
        UserError: no such name can be, no token, no right to write there, or no connection; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    check_repository(name)
    hub = HfApi(library_name="flashgrpo")
    try:
        address = hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of Flash-GRPO")
    except HFValidationError as error:
        raise UserError(f"--push: {name!r:.100} can be no name of a repository") from error
    except Exception as error:  # of the hub, its client, or the connection
        raise UserError(
            f"--push: {name} was not written: {first_line(error)}; the export is in {folder}, and hf auth login gives "
            "this machine a token"
        ) from error
    return str(address)


def check_repository(name: str) -> None:
    """Refuse what is no OWNER/NAME, before anything is written."""
    owner, _, repository = name.partition("/")
    if not owner or not repository or "/" in repository:
        raise UserError(f"--push: {name!r:.100} is no repository; write OWNER/NAME")


def library_of(folder: Path, files: Sequence[str]) -> Library:
    """Return what loads adapters, or a folder without any; None where it is the code of the base model alone."""
    if files:
        return "peft" if any(Path(file).name == "adapter_config.json" for file in files) else "diffusers"
    import diffusers  # which is loaded by now

    index = folder / "model_index.json"
    kind = read_object(index).get("_class_name") if index.is_file() else None
    return "diffusers" if hasattr(diffusers, str(kind)) else None


def copy_samples(directory: RunDirectory, update: int, folder: Path) -> list[Shown]:
    """Copy the first pairs of samples that were kept of an update's evaluation into `folder`/samples."""
    from flashgrpo.report.samples import file_bytes, unselected_pairs

    line = next((line for line in directory.evaluations() if line.get("update") == update), {})
    shown = []
    for number, sample in enumerate(unselected_pairs(line)[:MOST_SHOWN]):
        names = []
        for which, file in (("base", sample["base_video"]), ("tuned", sample["video"])):
            content = file_bytes(directory.path, file)
            if content is not None:
                names.append(f"samples/{number}-{which}{Path(str(file)).suffix}")
                (folder / "samples").mkdir(exist_ok=True)
                (folder / names[-1]).write_bytes(content)
        if len(names) == 2:
            shown.append(Shown(str(sample.get("prompt", "")), *names))
    return shown


def evaluated(directory: RunDirectory, update: int) -> dict[str, Any] | None:
    """Return the evaluation of an update, on noise that selected nothing where it was selected among several."""
    lines = [directory.confirmation() or {}, *directory.evaluations()]
    return next((line for line in lines if line.get("update") == update), None)
