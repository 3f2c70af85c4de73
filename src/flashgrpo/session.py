"""A run in progress: resumes, evaluates, saves."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from flashgrpo.assembly import Assembly
from flashgrpo.config import RunConfig
from flashgrpo.config.settings import TrackingConfig
from flashgrpo.distributed.world import World, full_tensor, process_group
from flashgrpo.doctor import refuse_unsound
from flashgrpo.errors import SharedError, UserError
from flashgrpo.evaluation import confirmation
from flashgrpo.files import remove, write_aside
from flashgrpo.models.lora import weights_replaced
from flashgrpo.models.settings import Lora
from flashgrpo.run import checkpoint
from flashgrpo.run.checkpoint import Progress
from flashgrpo.run.directory import RunDirectory
from flashgrpo.run.gallery import Gallery
from flashgrpo.run.progress import Clock, Interrupt, Reporter, last_words, machine_of, traced
from flashgrpo.run.shared import refuse_unshared
from flashgrpo.run.trackers import Trackers, check_installed
from flashgrpo.run.writer import Writer
from flashgrpo.scoring.heldout import evaluation_record, guard, selected


class Session:
    """A run in progress: its directory, model, optimizer and how far it has come. Opening it resumes it."""

    @classmethod
    @contextmanager
    def opened(cls, config: RunConfig, reporter: Reporter | None = None) -> Iterator["Session"]:
        """Yield the run of a recipe among the processes that this one belongs to, resumed or new."""
        config = config.with_absolute_paths()
        with process_group(config.parallel, config.model.compute_dtype) as world:
            reporter = reporter or Reporter(quiet=not config.tracking.progress)
            session = cls(config, reporter if world.is_main else Reporter(Console(quiet=True)), world)
            with session._interrupt, session:
                yield session

    def __init__(self, config: RunConfig, reporter: Reporter, world: World) -> None:
        self.config, self.reporter, self.world = config, reporter, world
        self.progress = Progress()
        self.clock = Clock()
        self._interrupt = Interrupt(patient=world.size > 1)
        self._evaluations: list[dict[str, Any]] = []
        self.directory = RunDirectory(Path(config.out))
        world.on_main(lambda: check_installed(config.tracking))
        world.on_main(lambda: self.directory.check(config))
        refuse_unshared(self.directory.path, world)
        self.parts = Assembly(config, world, reporter.say, reporter.watch)
        self.optimizer = self.parts.optimizer
        self.gallery = Gallery(self.directory.path, self.parts.evaluator, self.parts.process, world, config.model.fps)
        self.writer = Writer(self.directory.checkpoints, config.checkpoint.keep, world)
        process = self.parts.process
        prompts = {"prompts.train": self.parts.prompts, "prompts.heldout": self.parts.heldout}
        begin = partial(self.directory.begin, config, world, prompts, process.identity, process.takes_image)
        world.on_main(lambda: begin(reporter.warn))
        shown = config.tracking if world.is_main else TrackingConfig()
        self.trackers = Trackers(shown, self.directory.path, config.model_dump(mode="json"), reporter.warn)

    def __enter__(self) -> "Session":
        try:
            self._resume()
            self.reporter.start(self.progress.update, self.config.updates)
            self.evaluate_if_due()
        except BaseException:
            self._close()
            raise
        return self

    def _resume(self) -> None:
        """Examine a new run and score its base model; continue another from its newest checkpoint that is whole."""
        saved, self._evaluations = self.world.on_main(self._find_checkpoint)
        if not saved:
            refuse_unsound(self.parts, self.reporter.warn)
            if lags := self.config.optim.average_lags(self.config.updates):
                self.reporter.warn(lags)
        if not self._evaluations:
            self.reporter.say("scoring the base model")
            self._evaluate(0)
        elif not saved:
            self.reporter.say(f"{self.directory.path} has no checkpoint: from update 1, with the base model's score")
        self.parts.rewards.began_with([*self._evaluations[0]["rewards"], *self._evaluations[0]["watched"]])
        self.progress = self._as_evaluated(Progress())
        self.writer.resumed(self.progress)
        if saved:
            known, state, folder = Progress.of(saved), self.parts.state(), self.directory.path
            checkpoint.read_into(self.directory.checkpoints, known.update, state, self.world)
            self.optimizer.restored(state, known.skipped_in_a_row)
            self.progress = self._as_evaluated(known)
            self.writer.resumed(replace(known, evaluated=self.progress.evaluated))
            more = f"is complete; updates={2 * known.update} goes on, another `out` begins anew"
            done = known.update >= self.config.updates and not self._evaluation_due
            self.reporter.say(f"{folder} {more}" if done else f"continuing {folder} after update {known.update}")
        self._export_again()
        self.world.check_replicas(self.optimizer.weights())

    def _as_evaluated(self, known: Progress) -> Progress:
        """Where the run stands by its evaluations, and by the best update that a checkpoint knows."""
        best = max([known.best_update, *(line["update"] for line in self._evaluations if line["best"])])
        evaluated = tuple(line["update"] for line in self._evaluations)
        return replace(known, best_update=best, stale=sum(other > best for other in evaluated), evaluated=evaluated)

    def _export_again(self) -> None:
        """Make the exported adapters those of the best evaluation: an export may have failed, or been interrupted."""
        best, folder, lora = self.progress.best_update, self.directory.checkpoints, self.directory.lora
        if not isinstance(self.config.model.train, Lora):
            return
        if not best:  # what lies there is of an update after the checkpoint that the run resumes from
            self.world.on_main(lambda: remove(lora) if lora.exists() else None)
            return
        averaged = {name: tensor.detach().clone() for name, tensor in self.optimizer.ema.items()}
        if best < self.progress.update:
            try:
                self.world.on_main(lambda: asdict(checkpoint.read_progress(folder, best)))
            except UserError as error:
                self.reporter.warn(f"{lora} may not be of the best evaluation, update {best}: {error}")
                return
            checkpoint.read_into(folder, best, {"ema": averaged}, self.world)
        self._export(averaged)

    def _find_checkpoint(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        progress = self.directory.newest_checkpoint(self.reporter.warn)
        base, later = (lines := self.directory.evaluations())[:1], lines[1:]
        # Of the samples only the base's are looked at again, and all of them would be most of what travels.
        short = [{key: value for key, value in line.items() if key != "samples"} for line in later]
        return asdict(progress) if progress else None, [*base, *short]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Whatever ended the loop, the updates that are done are kept - unless the ranks no longer go together."""
        try:
            if kind is None:
                self.save()
                self.writer.wait()
            elif self.world.size == 1 or issubclass(kind, SharedError):
                try:
                    self.save()
                    self.writer.wait()
                except UserError as error:
                    self.reporter.warn(str(error))
        finally:
            self._close()
        if self.writer.saved.update < self.progress.update:
            self.reporter.warn(f"updates after {self.writer.saved.update} could not be saved and will be done again")
        if kind is None and self.world.is_main:
            why = f"after update {self.progress.update}: {self.ending or 'interrupted'}"
            stopped = why if self.progress.update < self.config.updates else None
            best = self.directory.confirmation()
            self.reporter.say(last_words(self.directory.path, self._evaluations, best, stopped))

    def _close(self) -> None:
        self.reporter.stop()
        self.trackers.close()
        self.parts.rewards.close()
        self.directory.close()

    @property
    def ending(self) -> str | None:
        """Why the run is to end before its last update: a watched reward has fallen, or nothing gets better."""
        patience, best = self.config.evaluation.patience, self.progress.best_update
        if fallen := guard(self._evaluations[-1], self.config.rewards):
            return f"{fallen}; " + (f"the best checkpoint is that of update {best}" if best else "keep the base model")
        stale = patience is not None and self.progress.stale >= patience
        return f"no new best in {self.progress.stale} evaluations" if stale else None

    @property
    def done(self) -> bool:
        """Whether the run has come to its end, the last update or one before."""
        return self.progress.update >= self.config.updates or self.ending is not None

    @property
    def interrupted(self) -> int:
        """The number of the signal that any rank was sent, 0 without; all ranks ask together."""
        return max(self.world.all_gather_json(self._interrupt.number))

    def updates(self) -> Iterator[int]:
        """Yield the updates that are left, until nothing gets better or somebody interrupts."""
        trace = self.directory.path / "profile" / f"rank-{self.world.rank}.json.gz"
        with traced(self.config.tracking.profile, trace) as update_ended:
            machine_of(self.clock, 0, self.world)
            for update in range(self.progress.update, self.config.updates):
                if self.done or self.interrupted:
                    return
                yield update
                update_ended()

    def log(self, metrics: dict[str, Any]) -> None:
        """Append the update's line to metrics.jsonl; the update counts as done from here on."""
        line = {"update": self.progress.update + 1, **metrics, **machine_of(self.clock, metrics["samples"], self.world)}
        self.world.on_main(lambda: self.directory.log_metrics(line))
        self.trackers.log("train", line)
        skipped = self.optimizer.skipped_in_a_row
        self.progress = replace(self.progress, update=line["update"], skipped_in_a_row=skipped)
        self.reporter.update(line)

    def evaluate_if_due(self) -> None:
        """Evaluate the averaged weights when it is due and after the last update, once; export a new best."""
        if self._evaluation_due:
            with self.clock("evaluate"):
                self._evaluate_average(self.progress.update)
            self.save()

    @property
    def _evaluation_due(self) -> bool:
        update, every = self.progress.update, self.config.evaluation.every
        return (update % every == 0 or update == self.config.updates) and self._evaluations[-1]["update"] < update

    def _evaluate_average(self, update: int) -> None:
        with weights_replaced(self.parts.process.network, self.optimizer.ema):
            line = self._evaluate(update)
        self.progress = self._as_evaluated(replace(self.progress, update=update))
        if update == self.config.updates and (lags := self.config.optim.average_lags(update)):
            self.reporter.warn(lags)
        if line["best"] and isinstance(self.config.model.train, Lora):
            self._export(self.optimizer.ema)

    def _export(self, averaged: Mapping[str, Tensor]) -> None:
        """Write adapters, of which each rank may hold a part, into `lora/`."""
        whole = {name: full_tensor(tensor) for name, tensor in averaged.items()}

        def write() -> None:
            with write_aside(self.directory.lora) as aside:
                self.parts.process.save_lora(aside, whole)

        self.world.on_main(write)

    def _evaluate(self, update: int) -> dict[str, Any]:
        evaluation = self.parts.evaluator()
        earlier = self._evaluations
        line = evaluation_record(
            update, evaluation, earlier[0] if earlier else None, self.config.evaluation.samples_per_prompt
        )
        line["average_moved"] = self.config.optim.average_moved(update)
        line["watch"] = guard(line, self.config.rewards)
        admitted = [e["reward"] for e in earlier if not e.get("watch")]
        line["best"] = not line["watch"] and line["reward"] > max(admitted, default=float("-inf"))
        if line["best"] or line["watch"] or update == self.config.updates:
            base = (earlier[0] if earlier else line)["samples"]
            changed = isinstance(self.config.model.train, Lora)  # whose base can be had by taking adapters off
            files = self.gallery.keep(line, base, evaluation, changed)
            self.trackers.media(update, {label: self.directory.path / file for label, file in files.items()})
        self.world.on_main(lambda: self.directory.log_evaluation(line))
        self.trackers.log("heldout", line)
        if line["watch"] and update == self.config.updates:  # where it ends the run sooner, that says it
            self.reporter.warn(line["watch"])
        self._evaluations.append(line)
        self.reporter.evaluation(line)
        return line

    def confirm(self) -> None:
        """Score the checkpoint that was selected once more, on noise that selected nothing, once the run has ended.

        Without the base model, which a full training does not keep beside its weights, `evaluate` does it instead.
        """
        update = selected(self._evaluations)
        if not self.done or update is None or self.interrupted:
            return
        if self.world.on_main(lambda: self.directory.confirmation() is not None):
            return
        if not isinstance(self.config.model.train, Lora):
            self.reporter.say(f"update {update} is the best of several: `flashgrpo evaluate` scores it on other noise")
            return
        self.save()
        self.writer.wait()
        try:
            self.world.on_main(lambda: asdict(checkpoint.read_progress(self.directory.checkpoints, update)))
        except UserError as error:
            self.reporter.warn(str(error))
            return
        self.reporter.say(f"scoring the best update, {update}, and the base model on noise that selected nothing")
        record = confirmation(self.parts, self.directory, update, self._evaluations)
        self.world.on_main(lambda: self.directory.write_confirmation(record))

    def save_if_due(self) -> None:
        """Begin a checkpoint when it is due, and before every evaluation, which may take longer than updates."""
        if self.progress.update % self.config.checkpoint.every == 0 or self._evaluation_due:
            with self.clock("checkpoint"):
                self.save()

    def save(self) -> None:
        """Begin a checkpoint, unless there is one of this update or an update was broken off in the middle."""
        steps = self.config.optim.steps(self.progress.update)
        whole_update = self.optimizer.whole and self.optimizer.steps == steps
        if whole_update and self.progress != self.writer.begun:
            self.world.check_replicas(self.optimizer.weights())
            self.writer.save(self.parts.state(), self.progress)
