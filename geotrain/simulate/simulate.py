"""simulate(job): a plan, a simulation of it, an outcome; and sweeps over values of a job's keys."""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from geotrain.data.inventory import Inventory, Shard, take_inventory
from geotrain.errors import DataError, JobError
from geotrain.job import JobSpec, MetricGoal, parse_job
from geotrain.metrics import add_sums, means
from geotrain.partition.building import check_tables, make_trainer, seat_replica
from geotrain.partition.flat import FlatModel
from geotrain.partition.probing import payload_bytes
from geotrain.partition.server import ParameterServer
from geotrain.partition.trainer import evaluate
from geotrain.plan.planner import Plan, UpdateSize, make_plan
from geotrain.plan.power import Offer
from geotrain.simulate.body import Body, Ghost, Sizes, Trained, Wire
from geotrain.simulate.network import Network, read_trace
from geotrain.simulate.simulation import Outcome, Point, Simulation
from geotrain.sync.feedback import coding_of
from geotrain.sync.fragments import make_fragments
from geotrain.sync.machine import outside, round_machine
from geotrain.sync.messages import View
from geotrain.sync.pace import Pace
from geotrain.sync.progress import Progress
from geotrain.sync.sparse import Table
from geotrain.sync.strategy import Merging, strategy_of
from geotrain.task import load_task

Told = Callable[[Point], None]
"""Called with how it stands after every segment."""


@dataclass(frozen=True, slots=True)
class Model:
    """What a simulation must know of a model: the sizes of its tensors, of which the first so many elements are parameters."""

    tensors: tuple[int, ...]
    parameters: int
    tables: tuple[Table, ...] = ()

    @property
    def elements(self) -> int:
        return sum(self.tensors)


def simulate(job: JobSpec, *, real: bool, goal: MetricGoal | None = None, told: Told | None = None) -> Outcome:
    """Run a job on a virtual clock. `real`: with real numbers, deterministic from the job's seed; else time and bytes only.

    Raises JobError, DataError, TaskError.
    """
    inventory = {region.name: _inventory(job, region.name, needed=real) for region in job.regions}
    model = _model(job)
    plan = _plan(job, inventory, model)
    make = _trained(job, plan, inventory) if real else _ghosts(job, plan, model)
    with closing(Simulation(job, plan, _network(job), make, job.train.seed)) as simulation:
        return _play(simulation, _held_out(job) if real else {}, goal, told)


def _play(simulation: Simulation, held_out: Mapping[str, Inventory], goal: MetricGoal | None, told: Told | None) -> Outcome:
    """Segment after segment, to the end or to the goal."""
    job, plan = simulation.job, simulation.plan
    curve: list[Point] = []
    for number in range(1, plan.segments + 1):
        if not simulation.segment(plan.segment_end(number)):
            return _outcome(simulation, curve, None, stuck=True)
        curve.append(simulation.point(_evaluate(simulation, held_out, job.train.batch_size)))
        if told:
            told(curve[-1])
        if goal and goal.reached(_metric(curve[-1], goal)):
            return _outcome(simulation, curve, curve[-1], stuck=False)
    stuck = False
    if not strategy_of(job.sync, len(job.regions), plan.chosen).ends_equal:
        stuck = not simulation.merge_fully()
        curve.append(simulation.point(_evaluate(simulation, held_out, job.train.batch_size)))
    return _outcome(simulation, curve, None, stuck=stuck)


def _outcome(simulation: Simulation, curve: list[Point], reached: Point | None, *, stuck: bool) -> Outcome:
    last = simulation.point(curve[-1].metrics if curve else {})
    sent: Counter[str] = Counter()
    for (source, _), link in simulation.network.links.items():
        sent[source] += link.bytes
    regions = {
        name: {
            "samples": node.body.totals.samples,
            "steps": node.body.totals.steps,
            "held_s": node.body.totals.held_s,
            "busy_s": node.busy_s,
            "missed": node.body.missed,
            "wire_bytes": sent[name],
        }
        for name, node in simulation.nodes.items()
    }
    rounds = max(node.body.machine.at.round for node in simulation.nodes.values())
    return Outcome(last.seconds, last.usd, last.wan_bytes, last.samples, rounds, last.metrics, regions, curve, reached, stuck)


def _metric(point: Point, goal: MetricGoal) -> float:
    if goal.metric not in point.metrics:
        raise JobError(
            f"no metric '{goal.metric}' to aim for; there are: {', '.join(sorted(point.metrics)) or 'none without --numerics real'}"
        )
    return point.metrics[goal.metric]


def _held_out(job: JobSpec) -> dict[str, Inventory]:
    task = load_task("here", job.task, job.task_args)
    return {region.name: take_inventory(region, region.data.eval, task.columns) for region in job.regions if region.data.eval}


def _evaluate(simulation: Simulation, held_out: Mapping[str, Inventory], batch_size: int) -> dict[str, float]:
    bodies = {name: simulation.nodes[name].body for name in held_out if not simulation.nodes[name].lost}
    sums = [evaluate(body.trainer, held_out[name], batch_size) for name, body in sorted(bodies.items()) if isinstance(body, Trained)]
    return means(add_sums(sums)) if sums else {}


def _inventory(job: JobSpec, region: str, *, needed: bool) -> Inventory:
    """What a region's data is: counted where it can be read from here, else as the job assumes."""
    spec = job.region(region)
    try:
        return take_inventory(spec, spec.data.train, load_task(region, job.task, job.task_args).columns)
    except DataError:
        if needed:
            raise
    groups = [job.simulate.rows // 64] * 64
    groups[0] += job.simulate.rows - sum(groups)
    return Inventory(region, spec.data.train, (Shard(spec.data.train, "", 0, tuple(size for size in groups if size)),), {})


def _model(job: JobSpec) -> Model:
    if job.simulate.model_mb is not None:
        elements = round(job.simulate.model_mb * 250_000)
        return Model((elements,), elements)
    torch.manual_seed(job.train.seed)
    flat = FlatModel(load_task("here", job.task, job.task_args).model(), torch.device("cpu"))
    check_tables(job, flat.tables)
    return Model(tuple(slot.stop - slot.start for slot in flat.slots), flat.parameters, flat.tables)


def _plan(job: JobSpec, inventory: Mapping[str, Inventory], model: Model) -> Plan:
    offers = {
        region.name: [Offer(d.kind, d.count, d.usd_per_hour, d.samples_per_s or job.simulate.samples_per_s) for d in region.devices]
        for region in job.regions
    }
    size = payload_bytes(job, model.elements, model.parameters)
    return make_plan(job, inventory, offers, UpdateSize(size, size * job.simulate.exchange_ms_per_mb * 1e-9, 4 * model.elements))


def _network(job: JobSpec) -> Network:
    traces = read_trace(job.links.trace) if job.links and job.links.trace else {}
    names = [region.name for region in job.regions]
    for link in traces:
        if link != "all" and not any(link == f"{a}{sign}{b}" for a in names for b in names if a != b for sign in ">-"):
            raise JobError(f"links.trace: '{link}' is not all, 'one>other' or 'one-other' of the regions {', '.join(names)}")
    return Network(job.link, random.Random(job.train.seed + 1), traces)


def _machine_at(job: JobSpec, plan: Plan, region: str, view: View, steps_in: Callable[[int], int], *, joins: bool) -> Any:
    planned = plan.region(region)
    at = Progress(region, outside(region) if joins else view, Pace(planned.rounds_per_epoch, steps_in), rows=planned.rows)
    return round_machine(strategy_of(job.sync, len(job.regions), plan.chosen), at, joins=joins)


def _ghosts(job: JobSpec, plan: Plan, model: Model) -> Callable[[Simulation, str, View, bool], Body]:
    strategy, coding = strategy_of(job.sync, len(job.regions), plan.chosen), coding_of(job.sync, model.tables)
    turns = strategy.turns if isinstance(strategy, Merging) else 1
    fragments = make_fragments(model.tensors, model.parameters, turns, tuple(plan.shares.values()))
    known: dict[tuple[Any, int, int, str], int] = {}
    sizes = Sizes(coding, fragments, model.elements, model.parameters, turns, plan.bits, job.simulate.touched_rows)
    varies = coding.feedback == "dgc"

    def size(update: Any) -> int:
        key = (update.kind, update.fragment, update.round if varies else 0, update.origin if plan.bits else "")
        if key not in known:
            if varies:
                known.clear()
            known[key] = sizes.of(update)
        return known[key]

    def make(simulation: Simulation, region: str, view: View, joins: bool) -> Body:
        steps = plan.region(region).steps_per_epoch
        return Ghost(
            _machine_at(job, plan, region, view, lambda epoch: steps, joins=joins),
            plan.region(region).rows,
            steps,
            size,
            lambda to, update, payload_bytes, payload: simulation.send(region, to, update, payload_bytes, payload),
            lambda when: simulation.wake(region, when),
            lambda: simulation.now,
        )

    return make


def _trained(job: JobSpec, plan: Plan, inventory: Mapping[str, Inventory]) -> Callable[[Simulation, str, View, bool], Body]:
    """Regions with numbers. The workers of a region train as one that takes all their batches."""

    def make(simulation: Simulation, region: str, view: View, joins: bool) -> Body:
        batch = job.train.batch_size * plan.region(region).workers
        as_one = job.model_copy(update={"train": job.train.model_copy(update={"batch_size": batch})})
        trainer = make_trainer(as_one, region, inventory[region], 0, 1, None)
        strategy = strategy_of(job.sync, len(job.regions), plan.chosen)
        events: Counter[str] = Counter()
        server = ParameterServer(
            region,
            _machine_at(job, plan, region, view, trainer.rows.steps_in, joins=joins),
            seat_replica(job, trainer.flat, strategy, tuple(plan.shares.values()), plan.bits.get(region)),
            Wire(lambda to, update, payload_bytes, payload: simulation.send(region, to, update, payload_bytes, payload)),
            attend=lambda: None,
            stop_wanted=lambda: False,
            report=lambda record: None,
            event=lambda what, facts: events.update([what]),
            clock=lambda: simulation.now,
        )
        return Trained(trainer, server, events, lambda when: simulation.wake(region, when))

    return make


def parse_goal(text: str) -> MetricGoal:
    """`accuracy>=0.95` or `loss<=0.3`. Raises JobError."""
    for sign, key in ((">=", "at_least"), ("<=", "at_most")):
        metric, found, value = text.partition(sign)
        if found:
            try:
                return MetricGoal.model_validate({"metric": metric.strip(), key: float(value)})
            except ValueError:
                break
    raise JobError(f"--target {text}: write METRIC>=NUMBER or METRIC<=NUMBER")


def sweeps(axes: Sequence[tuple[str, Sequence[Any]]]) -> list[dict[str, Any]]:
    """Every combination of the axes' values, as overrides of a job."""
    return [dict(zip([key for key, _ in axes], values, strict=True)) for values in itertools.product(*(values for _, values in axes))]


def many(job: JobSpec, regions: int) -> JobSpec:
    """The job with so many regions: copies of its own in turn, `tokyo-2` for the second tokyo, on links like the others'.

    Raises JobError where the rest of the job does not fit so many.
    """
    copies = []
    for number in range(regions):
        spec = job.regions[number % len(job.regions)]
        copy = number // len(job.regions) + 1
        copies.append(spec if copy == 1 else spec.model_copy(update={"name": f"{spec.name}-{copy}"}))
    return parse_job(job.model_copy(update={"regions": tuple(copies)}).to_dict(), f"{job.name} with {regions} regions")
