"""Whether a recipe fits a card, by the estimate of its memory, and which setting to change first where it does not."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from flashgrpo.config import RunConfig
from flashgrpo.doctor.estimate import MemoryEstimate, estimate
from flashgrpo.errors import UserError
from flashgrpo.jsontext import to_json

GIB = 2**30


@dataclass(frozen=True)
class Verdict:
    """Whether it fits, and a sentence that says by how much."""

    fits: bool
    sentence: str


def verdict(config: RunConfig, counted: MemoryEstimate, card: float) -> Verdict:
    """Hold an estimate against a card of so many GiB."""
    highest, phase = counted.highest / GIB, max(counted.totals, key=lambda name: counted.totals[name])
    need = f"{phase} needs {highest:.1f} GiB at the highest"
    if highest <= card:
        return Verdict(True, f"fits a card of {card:g} GiB: {need}, {card - highest:.1f} less than there is")
    words = f"does not fit a card of {card:g} GiB: {need}, {highest - card:.1f} too many"
    tried = {name: estimate(other, processes) for name, other, processes in _changes(config, counted.processes)}
    fitting = [name for name, found in tried.items() if found.highest <= card * GIB]
    lower = [name for name in tried if tried[name].highest < counted.highest]
    first = fitting[0] if fitting else min(lower, key=lambda name: tried[name].highest, default=None)
    if first is None:
        return Verdict(False, f"{words}; no single setting lowers it")
    change = f"change {first} first: {tried[first].highest / GIB:.1f} GiB, {told(tried[first].processes)}"
    return Verdict(False, f"{words}; {change}")


def told(processes: int) -> str:
    """Say what a count is for."""
    return f"counted for {processes} process{'es' if processes > 1 else ''}"


def print_estimate(config: RunConfig, processes: int | None, card: float | None, as_json: bool) -> bool:
    """Print what a recipe needs of memory; returns whether it fits the card, where one is given."""
    result = estimate(config, processes)
    judged = verdict(config, result, card) if card else None
    if as_json:
        counted = {"processes": result.processes, "parameters": result.parameters, "bytes": result.phases}
        found = {"highest": result.highest, "host": result.host, "card": judged and asdict(judged)}
        print(to_json({**counted, **found}))
        return not judged or judged.fits
    names = list(next(iter(result.phases.values())))
    table = Table("GiB", *names, "together", box=None)
    for phase, parts in result.phases.items():
        sizes = (*(parts.get(name, 0) for name in names), result.totals[phase])
        table.add_row(phase, *(f"{size / GIB:.2f}" for size in sizes))
    Console().print(table)
    counts = ", ".join(f"{name} {_count(count)}" for name, count in result.parameters.items())
    print(f"parameters: {counts}; {result.highest / GIB:.1f} GiB a process at the highest, {told(result.processes)}")
    held = ", ".join(f"{name} {size / GIB:.1f}" for name, size in result.host.items())
    print(f"in the host's memory, for videos, GiB a process: {held}")
    if judged:
        print(judged.sentence)
    return not judged or judged.fits


def _count(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number / 1e3:,.1f} thousand"


def _changes(config: RunConfig, processes: int) -> Iterator[tuple[str, RunConfig, int]]:
    """Yield what may lower the memory, the cheapest first: override, settings, processes."""
    shard = max(2, 2 * config.parallel.shard)
    fewest = -(-processes // (shard * config.parallel.context)) * shard * config.parallel.context
    for section, key, value, needed in (
        ("rollout", "decode_micro_batch", 1, processes),
        ("rollout", "micro_batch", 1, processes),
        ("optim", "micro_batch", 1, processes),
        ("optim", "grad_norm_by_step", False, processes),
        ("model", "gradient_checkpointing", True, processes),
        ("model", "offload", True, processes),
        ("parallel", "shard", shard, fewest),
    ):
        tree: dict[str, Any] = config.model_dump(mode="json")
        if tree[section][key] == value or (key == "offload" and processes > 1):
            continue
        tree[section][key] = value
        try:
            yield f"{section}.{key}={str(value).lower()}", RunConfig.parse(tree, "the recipe"), needed
        except UserError:  # not with the other settings
            continue
