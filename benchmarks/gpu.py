"""All that waits for a GPU, in one command of at most ten minutes: checks first, then seconds and memory at full size.

    python benchmarks/gpu.py --write        on one GPU: writes the table of docs/hardware.md
    python benchmarks/gpu.py --small        the same steps on whatever is there, with the bundled model

Every step is a process of its own with its share of the time. One that fails or takes too long is said so in the table,
and the others go on; what has ended is kept in `--out` and not done again. Weights are random, nothing is downloaded.
"""

import argparse
import datetime
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "hardware.md"
BEGIN, END = "<!-- what benchmarks/gpu.py measured -->", "<!-- end of it -->"
WAYS = {  # each beside the published way to compute an update
    "points": "rollout.deterministic_steps=5 rollout.solver.kind=unipc",
    "bfloat16": "rollout.deterministic_dtype=bfloat16",
    "float8": "rollout.deterministic_dtype=float8",
    "compiled": "model.compile=true",
    "cached": "rollout.reuse.kind=taylorseer",
    "retained": "rollout.retain=true",
}


@dataclass(frozen=True)
class Step:
    """A command that ends with a line of JSON, and the seconds that it may take."""

    name: str
    command: Sequence[str]
    seconds: int


def steps(recipe: str, small: bool, out: Path) -> list[Step]:
    """Return what is done, in order: what is cheap and can find a fault comes first."""
    python, cli = [sys.executable], [sys.executable, "-m", "flashgrpo"]
    sizes = ["rollout.prompts=1", "rollout.group_size=4", "optim.minibatches=1", "optim.ema.every=1"]
    sizes += [] if small else ["model.random_init=true", "model.num_frames=17"]
    short = ["rollout.prompts=2", "rollout.group_size=4", "evaluation.every=1", "evaluation.num_steps=4", "updates=1"]
    ways = [f"{name}={changes}" for name, changes in WAYS.items() if not small or name in ("points", "bfloat16")]
    return [
        Step("attention", [*python, str(HERE / "gpu.py"), "--attention"], 60),
        Step("doctor", [*cli, "doctor", "tiny", "--json", f"out={out / 'doctor'}", "evaluation.num_steps=4"], 120),
        # FSDP2 needs a process group also where one process is all there is: of NCCL on a GPU.
        Step("one rank", [*cli, "train", "tiny", f"out={out / 'rank'}", "model.compute_dtype=bfloat16", *short], 120),
        Step("full size", [*python, str(HERE / "hardware.py"), "--recipe", recipe, "--json"], 240),
        Step("ways", [*python, str(HERE / "update.py"), recipe, "--updates", "1", "--json", *sizes, *ways], 300),
    ]


def carry_out(step: Step, out: Path, deadline: float) -> dict[str, Any]:
    """Run a step and return what it said; keep that in a file, and take it from there at the next time."""
    file = out / f"{step.name.replace(' ', '-')}.json"
    if file.exists():
        return dict(json.loads(file.read_text("utf-8")))
    started, left = time.perf_counter(), deadline - time.perf_counter()
    answer: dict[str, Any] = {"command": shlex.join(step.command[1:])}
    try:
        done = subprocess.run(step.command, capture_output=True, text=True, timeout=max(1.0, min(step.seconds, left)))
    except subprocess.TimeoutExpired:
        return answer | {"failed": f"not ended after {time.perf_counter() - started:.0f} s"}
    answer["seconds"] = round(time.perf_counter() - started, 1)
    last = done.stdout.strip().splitlines()[-1:]
    said = json.loads(last[0]) if last and last[0].startswith("{") else None
    if said is None and done.returncode:
        return answer | {"failed": " ".join(done.stderr.split())[-300:] or f"exit code {done.returncode}"}
    answer["result"] = said
    file.write_text(json.dumps(answer, indent=1) + "\n", "utf-8")
    return answer


@torch.no_grad()
def attention() -> dict[str, Any]:
    """Tell for which dtypes and lengths attention has the same bits with gradients as without.

    A trained step is computed with gradients, the steps of a rollout without. Where the two differ, a first ratio is
    not 1 unless the rollout's recorded step is computed with gradients, too, as it is here; then nothing is lost.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for length in (256, 1024, 4096) if device.type == "cuda" else (64, 256):
            q, k, v = (torch.randn(1, 12, length, 128, device=device, dtype=dtype) for _ in range(3))
            without = scaled_dot_product_attention(q, k, v)
            with torch.enable_grad():
                learned = scaled_dot_product_attention(q.requires_grad_(), k, v)
            found[f"{str(dtype).removeprefix('torch.')}, {length} tokens"] = bool((without == learned).all())
    return found


def described(answers: dict[str, dict[str, Any]], device: str) -> str:
    """Return what was measured as the page's paragraphs and tables."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    lines = [f"{device}, {versions}, {datetime.date.today()}; `python benchmarks/gpu.py`, random weights.", ""]
    lines += ["| step | what came out |", "|---|---|"]
    lines += [f"| {name} | {outcome(name, answer)} |" for name, answer in answers.items()]
    if full := answers["full size"].get("result"):
        lines += [
            "",
            "| phase | seconds | peak GiB | peak / estimate | share of the matmul rate |",
            "|---|---|---|---|---|",
        ]
        for phase, spent in full["seconds"].items():
            gib, estimated = full["gib"][phase], full["estimated_gib"][phase]
            share = full["share_of_matmul"].get(phase)
            cells = [phase, f"{spent:.2f}", f"{gib:.2f}", f"{gib / estimated:.2f}", f"{share:.0%}" if share else ""]
            lines.append(f"| {' | '.join(cells)} |")
    if ways := answers["ways"].get("result"):
        lines += ["", "| way | seconds of an update | times faster | peak GiB |", "|---|---|---|---|"]
        for name, way in ways["ways"].items():
            lines.append(
                f"| {name} | {way['seconds']['total']:.2f} | {way['speedup'][0]:.2f} | {way['peak_gib']:.2f} |"
            )
    return "\n".join(lines)


def outcome(name: str, answer: dict[str, Any]) -> str:
    """Return one sentence of a step."""
    if "failed" in answer:
        return f"FAILED: {answer['failed']}".replace("|", "/")
    spent, result = f"{answer['seconds']:.0f} s", answer["result"] or {}
    if name == "attention":
        other = [where for where, same in result.items() if not same]
        return f"the same bits with gradients as without, but for: {', '.join(other)}" if other else "the same bits"
    if name == "doctor":
        unsound = [check["sentence"] for check in result["checks"] if check["level"] != "sound"]
        return f"{spent}: " + ("; ".join(unsound) if unsound else f"{len(result['checks'])} checks sound")
    return f"ended, {spent}"


def write(text: str) -> None:
    """Put what was measured in its place on the page."""
    page = PAGE.read_text("utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="wan21-1.3b")
    parser.add_argument("--small", action="store_true", help="the bundled model in place of the recipe's")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--write", action="store_true", help="write the table of docs/hardware.md")
    parser.add_argument("--attention", action="store_true", help="compare attention with and without gradients only")
    arguments = parser.parse_args()
    if arguments.attention:
        print(json.dumps(attention()))
        return
    if not torch.cuda.is_available() and not arguments.small:
        parser.error("there is no GPU here; --small goes through the same steps without one")
    deadline = time.perf_counter() + 60 * arguments.minutes
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    answers = {}
    for step in steps("tiny" if arguments.small else arguments.recipe, arguments.small, out):
        answers[step.name] = carry_out(step, out, deadline)
        print(f"{step.name}: {outcome(step.name, answers[step.name])}", flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    text = described(answers, device)
    print(f"\n{text}")
    if arguments.write:
        write(text)


if __name__ == "__main__":
    main()
