"""Run: one execution of a job as the control plane holds it. Each method is a stage; `conduct` says in which order, and flows
carry them out as tasks.

Nothing here knows Prefect, and nothing here touches a tensor.
"""

from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from typing import Any

from geotrain import checkpoint, measured, registry
from geotrain.errors import (
    GeotrainError,
    JobError,
    NothingToResume,
    Stopped,
)
from geotrain.job import JobSpec
from geotrain.members.late import commit_late
from geotrain.metrics import add_sums, means
from geotrain.report.folder import RunFolder, new_run_id
from geotrain.report.summary import summarize
from geotrain.run.training import Training
from geotrain.sync.strategy import Merging


class Run(Training):
    """A context manager: clusters begin to open when it is entered, and are closed whatever happens."""

    @classmethod
    def start(cls, job: JobSpec, *, believe: bool = True) -> "Run":
        """A new run, which believes what was measured of the links. Raises OutputUnwritable before anything is started."""
        found = measured.read(job) if believe else None
        job = measured.believed(job, found)
        folder = RunFolder.create(job, new_run_id(job.name))
        if found is not None:
            folder.event("links_measured", by=measured.url_of(job), when=found["at"])
        return cls(job, folder)

    @classmethod
    def resume(cls, folder: RunFolder, told: Callable[[str], None] = lambda words: None, without: Collection[str] = ()) -> "Run":
        """Continue from the newest checkpoint, without some regions, which leave for good.

        `told`: of a wait for another process's sign of life. Raises NothingToResume, RunTaken, JobError.
        """
        if folder.has("summary.json"):
            raise NothingToResume(folder.run, "it is complete")
        run = cls(folder.job(), folder)
        run.charge.take(told)
        try:
            run.left = {event["region"] for event in folder.lines("events.jsonl") if event["event"] == "left"}
            manifest = checkpoint.latest(folder.url)
            manifest = commit_late(folder, manifest, run.regions, agree=isinstance(run.strategy, Merging)) or manifest
            if manifest is None:
                raise NothingToResume(folder.run, "it has no checkpoint yet")
            run._take_up(manifest)
            run._leave_out(without)
            run._leave_behind()
        except BaseException:
            run.charge.release()
            raise
        return run

    def _leave_out(self, regions: Collection[str]) -> None:
        regions = set(regions) - self.left  # a resume that failed may be tried again as it was
        if unknown := regions - set(self.regions):
            raise JobError(f"--without {', '.join(sorted(unknown))}: the run has the regions {', '.join(self.regions)}")
        if regions == set(self.regions):
            raise JobError("--without: at least one region must be left")
        assert self.resumed is not None
        there = {part.region for part in self.resumed.parts if part.round == self.round} & set(self.regions)
        if regions and there <= regions:
            raise JobError("--without: no other region was there when the last checkpoint was made, so what it learned would be lost")
        for region in sorted(regions):
            self.left.add(region)
            self.folder.event("left", region=region)

    def open(self) -> "Run":
        """Begin to open the clusters, all at once, and return; who opens a run must enter and leave it."""
        if not self.partitions.begun:
            if not self.charge.held:
                self.charge.take(self.board.enter)
            if self.resumed:
                self.folder.event("resumed", round=self.resumed.round, segment=self.resumed.segment)
            self.partitions.open(self.regions)
        return self

    def __enter__(self) -> "Run":
        return self.open()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.control.abort.set()
        if self._closed:
            return
        self._closed = True
        try:
            self._end(error)
        finally:
            self.charge.release()

    def _end(self, error: BaseException | None) -> None:
        if error is not None:
            self._note_end(error)
        self.commits.close()
        if self._membership is not None:
            self._membership.close()
        self.replanner.close()
        self.partitions.close()
        if self._membership is not None:
            self._membership.join()
        self.folder.flush()

    def _asked(self, what: str, more: Mapping[str, Any]) -> None:
        """What the command line, or the loss of the lease, wants of this process."""
        if what == "drain" and more["region"] in self.regions:
            self.folder.event("asked_to_leave", region=more["region"])
            self.leaving.add(more["region"])
            self.control.turn.set()
        elif what == "drain" and more["region"] in self.left:
            self.folder.event("left", region=more["region"])  # as it did before
        elif what == "add":
            self._asked_to_add(more["region"])
        elif what == "stop" and self.training:
            self.board.enter("stopping: draining the round and writing a checkpoint")
            self.control.stop.set()
        elif what in ("stop", "force", "lost"):
            self._end_wanted = True
            self.control.hurry.set()
            self.control.abort.set()

    def _asked_to_add(self, region: Mapping[str, Any]) -> None:
        name = str(region.get("name"))
        self.folder.event("asked_to_come", region=name)
        why = "" if self.training else "the run does not train at the moment"
        if self.job.sync.topology == "owners":
            why = "with topology: owners the model would be cut anew: stop the run and begin another from its model"
        if self._coming:
            why = "another region is coming in: ask again when it is there"
        try:
            job = self.job.with_region(region)
        except ValueError as error:
            why = str(error)
        if why:
            self.folder.event("not_added", region=name, message=why)
            self.folder.flush(must=False)
            return
        self.replanner.prepare(job, name, dict(self.inventory), self.partitions.make)

    def _note_end(self, error: BaseException) -> None:
        if isinstance(error, Stopped) or not isinstance(error, Exception):
            self.stopped()
            return
        self.board.enter("failed")
        message = error.message if isinstance(error, GeotrainError) else f"{type(error).__name__}: {error}"
        self.folder.event("failed", message=message, round=self.round)

    def stopped(self) -> None:
        """Note an end on request."""
        self.board.enter("stopped")
        self.folder.event("stopped", round=self.round)

    def evaluate(self, region: str) -> dict[str, tuple[float, float]]:
        """Held-out sums and counts, computed in the region."""
        self.board.enter("evaluating on held-out data")
        self.board.status(region, "evaluating")
        sums = self.partitions[region].evaluate()
        self.board.status(region, "evaluated")
        return sums

    def conclude(self, sums: Mapping[str, Mapping[str, tuple[float, float]]]) -> dict[str, float]:
        """The metrics of the whole, from each region's sums."""
        self.metrics = means(add_sums([sums[region] for region in sorted(sums)]))
        self.board.metrics = self.metrics
        self.folder.event("evaluated", round=self.round, metrics=self.metrics)
        return self.metrics

    def publish(self) -> tuple[registry.Version, str] | None:
        """Write the model beside the run, and a version into the registry. Returns it with the verdict on the champion."""
        assert self.plan is not None
        self.charge.check(self.control.abort)
        self.board.enter("publishing")
        leader = self.partitions[self.plan.owner if self.plan.owner in self.present else self.present[0]]
        leader.write_model(checkpoint.join(self.folder.url, "model.safetensors"))
        spec = self.job.registry
        if spec is None:
            return None
        before = registry.of_run(spec.url, spec.model, self.id)  # by a process that was killed before it could say so
        number = before.number if before else registry.next_number(spec.url, spec.model)
        version = registry.Version(
            number=number,
            url=registry.model_url(spec.url, spec.model, number),
            run=self.id,
            job=self.job.digest(),
            metrics=self.metrics,
            watermark=self.watermark(),
            parent=self.warm_start.number if self.warm_start else None,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        leader.write_model(version.url)
        self.charge.check(self.control.abort)
        verdict = registry.enter(spec, version)
        self.folder.event("published", version=version.number, verdict=verdict)
        self.published = (version, verdict)
        return self.published

    def report(self) -> dict[str, Any]:
        """summary.json, report.html and report.md. The run is complete then. Returns the summary."""
        from geotrain.report import page  # matplotlib takes a second to import: only where it draws

        assert self.plan is not None
        self.board.enter("writing the report")
        summary = summarize(self.job, self.plan, self.folder, self.board, self.accounts.totals, self.accounts.traffic)
        if self.published:
            summary |= {"version": self.published[0].number, "verdict": self.published[1]}
        self.folder.event("completed", round=self.round, metrics=self.metrics)
        self.folder.flush()
        events = list(self.folder.lines("events.jsonl"))
        held_out = [event for event in events if event["event"] in ("segment", "evaluated")]
        chart = page.loss_chart(self.folder.lines("rounds.jsonl"), held_out)
        self.folder.write("report.html", page.html(summary, self.plan, chart, events))
        self.folder.write("report.md", page.markdown(summary, chart))
        self.folder.write_json("summary.json", summary)
        self.board.enter("complete")
        return summary


_BEGUN: dict[str, Run] = {}


def hand_over(run: Run) -> None:
    """Open a run's clusters and leave it to the flow that this process is about to call: the two start side by side."""
    run.handed_over = True
    _BEGUN[run.id] = run.open()


def taken_over(run: str, begin: Callable[[], Run]) -> Run:
    """The run that was left under this id, or else the one that `begin` makes. To be entered."""
    return _BEGUN.pop(run, None) or begin()
