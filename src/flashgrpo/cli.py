"""The command line. No logic lives here: each command reads its arguments, calls one function, shows the result.

Commands that are one function of a terminal's own lie beside it (`init`, `list`, `reward`).
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn, get_args

import typer

from flashgrpo import __version__
from flashgrpo.config import RunConfig, recipe_schema
from flashgrpo.errors import UserError, clean, suggest, system_reason
from flashgrpo.init import init
from flashgrpo.jsontext import to_json
from flashgrpo.listing import print_listing
from flashgrpo.outlets import check_arrived, outlets
from flashgrpo.serving.commands import reward_app
from flashgrpo.terminal import PATH, PATH_TEXT, check_arguments, path, path_text, prints, use_utf8

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(reward_app, name="reward")
app.command()(init)
app.command("list")(print_listing)
Recipe = Annotated[
    str,
    typer.Argument(parser=path_text, help="A YAML recipe, or the name of one that ships with the package."),
]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as key=value, for example updates=20.")]
RunFolder = Annotated[Path, typer.Argument(parser=path, help="A run directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead.")]


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Align video diffusion models with rewards by training one denoising step per rollout."""
    if version:
        print(__version__)
        raise typer.Exit()


@app.command()
def demo(
    out: Annotated[
        Path | None,
        typer.Option(**PATH, help="The run directory; runs/demo-seedS or the like when not given."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts, steps and noise.")] = 0,
    process: Annotated[
        str, typer.Option(help="Whose bundled model: flow, streaming, uniform-tokens, masked-tokens or programs.")
    ] = "flow",
) -> None:
    """Align a bundled model on this machine, from start to report, in minutes and without a GPU."""
    from flashgrpo.demo import demo as run_demo
    from flashgrpo.run.progress import Reporter, describe

    report, record = run_demo(out, seed, Reporter(), process)
    print(describe(record))
    print(f"report: {report}")


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    ray_workers: Annotated[int, typer.Option(min=0, help="Start this number of workers through Ray Train.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check what precedes an update; write no run.")
    ] = False,
    live: Annotated[bool, typer.Option("--watch", help="Serve a page that follows the run.")] = False,
) -> None:
    """Train a recipe, or resume a run directory. Under torchrun, with all its processes."""
    from flashgrpo.train import settings_of, train_on_ray
    from flashgrpo.train import train as run_training

    config = settings_of(recipe, overrides or [])
    if dry_run:
        from flashgrpo.doctor.rehearsal import rehearse

        return rehearse(config, ray_workers)
    with contextlib.ExitStack() as stack:
        if live and prints():
            from flashgrpo.report.live import watching

            stack.enter_context(watching(Path(config.out)))
        run = train_on_ray(config, ray_workers) if ray_workers else run_training(config)
    if prints():
        print(run)


@app.command()
def evaluate(
    target: Annotated[
        str,
        typer.Argument(parser=path_text, help="A run directory, or a recipe to score its base model."),
    ],
    overrides: Overrides = None,
    checkpoint: Annotated[int | None, typer.Option(help="The update to evaluate; the best when not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score the held-out prompts, paired with the base model."""
    from flashgrpo.evaluate import evaluate as run_evaluation
    from flashgrpo.evaluate import print_record

    record = run_evaluation(target, overrides or [], checkpoint)
    if prints():
        print_record(record, as_json)
        check_arrived()


@app.command()
def sample(
    run: RunFolder,
    prompt: Annotated[str | None, typer.Argument(help="What the model is asked for.")] = None,
    file: Annotated[str | None, typer.Option(**PATH_TEXT, help="A prompt file in place of PROMPT.")] = None,
    image: Annotated[str | None, typer.Option(**PATH_TEXT, help="The first frame, where the model takes one.")] = None,
    last_image: Annotated[str | None, typer.Option(**PATH_TEXT, help="The last frame, likewise.")] = None,
    out: Annotated[
        Path, typer.Option(**PATH, help="Video: .mp4, .gif, .png (contact sheet); else .png or .txt.")
    ] = Path("sample"),
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Of the noise, 0 by default; may be repeated.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Denoising steps; the evaluation's when not given.")] = None,
    size: Annotated[
        tuple[int, int, int] | None, typer.Option(min=1, help="HEIGHT WIDTH FRAMES; the run's when not given.")
    ] = None,
    checkpoint: Annotated[
        int | None, typer.Option(help="Update whose weights to take; the best checkpoint by default.")
    ] = None,
    label: Annotated[bool, typer.Option("--label", help="Write the prompt, seed and reward below each.")] = False,
) -> None:
    """Write what the base model makes beside what the tuned model does, from the same noise."""
    from flashgrpo.prompts import read_prompts
    from flashgrpo.sample import sample as run_sample
    from flashgrpo.types import Prompt

    if (prompt is None) == (file is None):
        raise UserError("give either a prompt or --file")
    given = {"image": image, "last_image": last_image}
    images = {name: one for name, one in given.items() if one is not None}
    if file is not None and images:
        raise UserError("--image: a prompt file names its images itself, in a column image")
    prompts = read_prompts(file, "--file") if file else [Prompt(prompt or "", images)]
    print(run_sample(run, prompts, out, seed or [0], steps, size, checkpoint, bool(images), label))


@app.command()
def export(
    run: RunFolder,
    format: Annotated[
        str, typer.Option(help="diffusers, comfyui (adapters) or merged (a whole pipeline).")
    ] = "diffusers",
    out: Annotated[Path | None, typer.Option(**PATH, help="The folder; RUN/export/FORMAT when not given.")] = None,
    checkpoint: Annotated[int | None, typer.Option(help="The update to export; the best when not given.")] = None,
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Also upload it to the hub.")] = None,
) -> None:
    """Write the tuned weights for diffusers or ComfyUI, with a model card."""
    from flashgrpo.export import Format, published

    if format not in get_args(Format):
        raise UserError(f"--format: {suggest(format, get_args(Format))}, not {format!r}")
    print(*published(run, format, out, checkpoint, push), sep="\n")  # type: ignore[arg-type]


@app.command()
def doctor(
    recipe: Recipe,
    overrides: Overrides = None,
    as_json: AsJson = False,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only count memory, without weights or a GPU.")] = False,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="With --estimate: of the run; the fewest that `parallel` allows."),
    ] = None,
    card: Annotated[float | None, typer.Option(min=0, help="With --estimate: GiB of a GPU that it is to fit.")] = None,
) -> None:
    """Measure whether a run of a recipe would be sound, and what it would cost; exit code 0 only when it would be."""
    if estimate:
        from flashgrpo.doctor.verdict import print_estimate

        fits = print_estimate(RunConfig.load(recipe, overrides or []), processes, card, as_json)
        check_arrived()
        raise typer.Exit(0 if fits else 1)
    from flashgrpo.doctor import examine

    diagnosis = examine(recipe, overrides or [])
    if prints():
        diagnosis.print(as_json)
    check_arrived()
    raise typer.Exit(0 if diagnosis.sound else 1)


@app.command()
def compare(
    recipe: Recipe,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings of all as key=value (algorithm.noise=... too); of one as NAME:key=value."),
    ] = None,
    algorithms: Annotated[
        str, typer.Option(help="Presets, or NAME={preset: ..., ...}, with commas; the first is the baseline.")
    ] = "flash-grpo,flow-grpo",
    seeds: Annotated[int, typer.Option(help="Runs of each, from the recipe's seed upwards.")] = 3,
    out: Annotated[Path | None, typer.Option(**PATH, help="The folder; runs/compare-RECIPE when not given.")] = None,
    budget: Annotated[
        int | None, typer.Option(help="Network forwards of a run; what `updates` cost the first algorithm by default.")
    ] = None,
    points: Annotated[int, typer.Option(help="Evaluations of a run, at equal shares of its compute.")] = 5,
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    keep: Annotated[str, typer.Option(help="Parts of the recipe's own algorithm to keep, for example noise.")] = "",
    level: Annotated[
        list[float] | None, typer.Option(help="A held-out reward whose cost to find; may be repeated.")
    ] = None,
    diagnose: Annotated[
        bool, typer.Option("--diagnose", help="Also measure gradients by step, reward variance and consistency.")
    ] = False,
) -> None:
    """Train several algorithms on one problem at equal compute, over seeds; resumes where it was interrupted."""
    from flashgrpo.compare import compare as run_comparison
    from flashgrpo.compare.table import as_markdown

    comparison = run_comparison(
        recipe, overrides or [], algorithms, seeds, out, budget, points, jobs, keep, level or [], diagnose
    )
    print(as_markdown(comparison))
    raise typer.Exit(0 if all(row["ended"] == row["seeds"] for row in comparison["summary"]) else 1)


@app.command()
def report(run: RunFolder) -> None:
    """Write RUN/report.html, one file that opens offline; of a comparison's folder likewise."""
    from flashgrpo.report import write_report

    print(write_report(run))


@app.command()
def watch(
    runs: Annotated[list[Path], typer.Argument(parser=path, metavar="RUN...", help="Run directories.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free; it is printed.")] = 0,
) -> None:
    """Serve a page on this machine that follows runs while they train."""
    from flashgrpo.report.live import watch as follow

    follow(runs, port)


@app.command()
def config(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print a recipe with every setting resolved."""
    print(RunConfig.load(recipe, overrides or []).to_yaml(), end="")
    check_arrived()


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    print(json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **recipe_schema()}, indent=2))
    check_arrived()


def main() -> None:
    """Run the command line: a `UserError`, or what the system says of a file, becomes one sentence and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    use_utf8()
    with outlets():
        try:
            check_arguments(sys.argv[1:])
            app()
        except UserError as error:
            _refuse(clean(str(error)), error.told)
        except OSError as error:
            if error.filename is None:
                raise
            _refuse(f"{clean(str(error.filename))}: {system_reason(error)}")


def _refuse(sentence: str, told: bool = False) -> NoReturn:
    """End with a sentence and code 2.

    torchrun adds some thirty lines of its own, which nothing here can keep it from; its last ones show, for each rank,
    the sentence that lies in the file that it names.
    """
    if not told:
        print(f"flashgrpo: {sentence}", file=sys.stderr)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            said = {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(file).write_text(to_json({"message": said}), "utf-8")
    sys.exit(2)
