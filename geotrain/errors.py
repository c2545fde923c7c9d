"""Every error that geotrain raises on purpose: who, where, what happened, and what to do about it.

    GeotrainError                  exit code
    ├── JobError                       2   the job file, or the command line, asks for something impossible
    ├── TaskError                      3   the user's own code
    │   ├── TaskImportError                it cannot be imported on a worker
    │   ├── TaskFailed                     it raised
    │   ├── ModelMismatch                  regions built different models
    │   └── NonFiniteLoss                  the loss, or a parameter, is NaN or infinite
    ├── DataError                      4   the data of a region
    │   ├── DataUnreachable                no such bucket, folder or credentials
    │   ├── UnreadableShard                not Parquet, truncated
    │   ├── MissingColumn                  the task needs a column that a file does not have
    │   ├── SchemaMismatch                 two files or regions disagree
    │   └── EmptyRegion                    no row to train on
    ├── ClusterError                   5   the Dask cluster of a region
    │   ├── ClusterUnreachable
    │   ├── ClusterTooSmall
    │   ├── WorkerLost
    │   ├── WorkerHangs
    │   ├── NobodyGoesOn                   all regions waited for each other
    │   ├── DeviceFailed                   its GPU, or its memory
    │   ├── WorkerLeaves                   it got SIGTERM
    │   └── QuorumLost                     too few regions are left
    ├── WanError                       6   between the regions
    │   ├── PeerUnreachable
    │   ├── CannotListen
    │   ├── UpdateRefused
    │   ├── UpdateUnusable                 what a region sent cannot be decoded
    │   ├── StateDamaged                   what a region was brought up to date with is not what another had
    │   ├── BadCertificate
    │   ├── MailboxUnusable
    │   └── Diverged                       replicas that must be equal are not
    ├── StateError                     7   run folders, checkpoints, the registry
    │   ├── OutputUnwritable
    │   ├── StoreUnusable                  it cannot be read
    │   ├── RunNotFound
    │   ├── RunTaken                       another process is in charge of it
    │   ├── NotRunning
    │   ├── NothingToResume
    │   ├── BadCheckpoint
    │   └── CheckpointUnreadable           whether it is sound cannot be known
    └── Stopped                       75   stopped on request; `geotrain resume` continues

An error is made from positional values, so that it survives the way from a worker to the flow. Of another error that is among them it keeps
what that says, or its kind where that says nothing.
"""

from typing import ClassVar


class GeotrainError(Exception):
    """The root. `says` and `remedy` are format strings over `fields`, which name the positional arguments."""

    exit_code: ClassVar[int] = 1
    fields: ClassVar[tuple[str, ...]] = ("detail",)
    says: ClassVar[str] = "{detail}"
    remedy: ClassVar[str] = ""

    def __init__(self, *values: object) -> None:
        assert len(values) == len(self.fields), (type(self).__name__, self.fields, values)
        values = tuple(str(value) or type(value).__name__ if isinstance(value, BaseException) else value for value in values)
        super().__init__(*values)
        self.named = dict(zip(self.fields, values, strict=True))

    @property
    def message(self) -> str:
        return self.says.format(**self.named)

    @property
    def advice(self) -> str:
        return self.remedy.format(**self.named)

    def __str__(self) -> str:
        return f"{self.message}\n  -> {self.advice}" if self.advice else self.message


class JobError(GeotrainError):
    exit_code = 2


class TaskError(GeotrainError):
    exit_code = 3


class TaskImportError(TaskError):
    fields = ("region", "path", "detail")
    says = "region {region}: the task {path} cannot be imported on a worker: {detail}"
    remedy = (
        "write it as 'module:Name'; list the file or folder that holds it under `code:`, and what it imports in the workers' environment"
    )


class TaskFailed(TaskError):
    fields = ("region", "where", "detail")
    says = "region {region}: the task failed in {where}: {detail}"
    remedy = "run `geotrain validate JOB --probe` after mending it: that takes one batch in every region"


class ModelMismatch(TaskError):
    fields = ("region", "other", "parameter", "detail")
    says = "the model of region {region} differs from that of {other} at {parameter}: {detail}"
    remedy = "model() must give the same parameters everywhere: same code, same versions, no randomness but torch's seeded generator"


class NonFiniteLoss(TaskError):
    fields = ("region", "round", "files")
    says = "region {region}: the loss or the parameters became NaN or infinite in round {round}, on rows of {files}; none of it left"
    remedy = "look for missing or extreme values there, or lower the learning rate; the last checkpoint is intact"


class DataError(GeotrainError):
    exit_code = 4


class DataUnreachable(DataError):
    fields = ("region", "uri", "detail")
    says = "region {region}: cannot list {uri}: {detail}"
    remedy = "check the bucket or folder name, and the credentials named in that region's storage_options"


class UnreadableShard(DataError):
    fields = ("region", "uri", "detail")
    says = "region {region}: {uri} is not a readable Parquet file: {detail}"
    remedy = "write the file again, or move it out of the data folder"


class MissingColumn(DataError):
    fields = ("region", "uri", "column", "present")
    says = "region {region}: {uri} has no column '{column}' (it has: {present})"
    remedy = "rename the column in the data, or the task's `columns`"


class SchemaMismatch(DataError):
    fields = ("region", "uri", "column", "found", "expected", "reference")
    says = "region {region}: column '{column}' of {uri} is {found}, but it is {expected} in {reference}"
    remedy = "write both with one schema: a model cannot be trained on columns of different types"


class EmptyRegion(DataError):
    fields = ("region", "uri")
    says = "region {region}: {uri} holds no row"
    remedy = "put Parquet files there, or take the region out of the job"


class ClusterError(GeotrainError):
    exit_code = 5


class ClusterUnreachable(ClusterError):
    fields = ("region", "where", "detail")
    says = "region {region}: no Dask cluster at {where}: {detail}"
    remedy = "check that region's `cluster:` (address, TLS files, import path) and that its scheduler is up"


class ClusterTooSmall(ClusterError):
    fields = ("region", "wanted", "got", "waited_s")
    says = "region {region}: {wanted} workers were planned, {got} came within {waited_s:.0f} s"
    remedy = "lower `devices: count`, or find out why the cluster does not scale"


class WorkerLost(ClusterError):
    fields = ("region", "worker", "doing")
    says = "region {region}: worker {worker} was lost while {doing}"
    remedy = "look for an out-of-memory kill or a hardware error on it; `geotrain resume` continues from the last checkpoint"


class WorkerHangs(ClusterError):
    fields = ("region", "worker", "waited_s")
    says = "region {region}: worker {worker} gave no sign of progress for {waited_s:.0f} s"
    remedy = "it was ended; look at its log and at that machine, then `geotrain resume`"


class NobodyGoesOn(ClusterError):
    fields = ("region", "waited_s", "detail")
    says = "region {region}: all regions waited for each other for {waited_s:.0f} s: {detail}"
    remedy = "this is a fault of geotrain: please report it with the run's events.jsonl; `geotrain resume` goes on from the last checkpoint"


class DeviceFailed(ClusterError):
    fields = ("region", "worker", "detail")
    says = "region {region}: the device or the memory of worker {worker} failed: {detail}"
    remedy = "out of memory: a smaller `train.batch_size`; else look at that machine's GPU (`nvidia-smi -q`, the kernel's log)"


class WorkerLeaves(ClusterError):
    fields = ("region", "worker")
    says = "region {region}: worker {worker} was told to end (SIGTERM), and has left in peace; no other is there"
    remedy = "nothing: the region comes back with its next worker"


class QuorumLost(ClusterError):
    fields = ("left", "quorum", "waited_s")
    says = "{left} regions are left, {quorum} are needed, and none came back within {waited_s:.0f} s"
    remedy = "bring a region's cluster back, then `geotrain resume`; or lower elastic.quorum"


class WanError(GeotrainError):
    exit_code = 6


class PeerUnreachable(WanError):
    fields = ("region", "peer", "address", "detail")
    says = "region {region} cannot reach {peer} at {address}: {detail}"
    remedy = "check {peer}'s wan.advertise and the firewall between the two"


class CannotListen(WanError):
    fields = ("region", "address", "detail")
    says = "region {region}: the leader cannot listen on {address}: {detail}"
    remedy = "free that port, or let `wan.listen` end in :0 to take any"


class UpdateRefused(WanError):
    fields = ("region", "reason")
    says = "region {region} refused an update: {reason}"
    remedy = "both ends must run the same job and the same version of geotrain"


class UpdateUnusable(WanError):
    fields = ("origin", "round", "detail")
    says = "the update of region {origin} for round {round} cannot be read: {detail}"
    remedy = "look at {origin}'s machine and its version of geotrain: what it sent arrived as it sent it"


class StateDamaged(WanError):
    fields = ("origin", "round")
    says = "the parameters of round {round} that region {origin} gave to another arrived with another SHA-256 than they left with"
    remedy = "test the memory of {origin}'s machine and of the one that asked; `geotrain resume` continues from the last checkpoint"


class BadCertificate(WanError):
    fields = ("region", "path", "detail")
    says = "region {region}: {path} cannot be used: {detail}"
    remedy = "make it anew with `geotrain certs region {region}`, and put ca.pem, {region}.pem and {region}.key on {region}'s workers"


class MailboxUnusable(WanError):
    fields = ("region", "url", "detail")
    says = "region {region} cannot use the mailbox {url}: {detail}"
    remedy = "check that bucket or folder, its storage_options, and the right of {region}'s workers to read and write there"


class Diverged(WanError):
    fields = ("round", "hashes")
    says = "after round {round} the regions hold different parameters: {hashes}"
    remedy = (
        "this is a fault in geotrain or in a machine's arithmetic: please report it with the run folder; the checkpoint before is intact"
    )


class StateError(GeotrainError):
    exit_code = 7


class OutputUnwritable(StateError):
    fields = ("who", "url", "detail")
    says = "{who} cannot write {url}: {detail}"
    remedy = "check `output.url` and the right to write there, from the flow and from every region's workers"


class StoreUnusable(StateError):
    fields = ("detail",)
    says = "a store cannot be used: {detail}"
    remedy = "check its URL, the network, and the credentials in the environment; one that fails for a while can be tried again"


class RunNotFound(StateError):
    fields = ("run", "looked_in")
    says = "no run '{run}' in {looked_in}"
    remedy = "give the run folder's path, or --runs URL; `geotrain status` lists the runs"


class RunTaken(StateError):
    fields = ("run", "holder")
    says = "run {run} is in the hands of {holder}"
    remedy = "let it go on, or end it first: `geotrain stop {run}`"


class NotRunning(StateError):
    fields = ("run",)
    says = "no process runs {run}, or the one that did was killed"
    remedy = "`geotrain status {run}` says how far it came; `geotrain resume {run}` goes on"


class NothingToResume(StateError):
    fields = ("run", "why")
    says = "run {run} cannot be resumed: {why}"
    remedy = "start it anew with `geotrain run`"


class BadCheckpoint(StateError):
    fields = ("url", "why")
    says = "checkpoint {url} is damaged: {why}"
    remedy = "remove its manifest.json: `geotrain resume` then takes the one before it"


class CheckpointUnreadable(StateError):
    fields = ("region", "url", "detail")
    says = "region {region} cannot read the checkpoint {url}: {detail}"
    remedy = "check that the region's workers reach that place, with credentials that are valid; then `geotrain resume`"


class Stopped(GeotrainError):
    exit_code = 75
    fields = ("run",)
    says = "run {run} was stopped; its last segment is checkpointed"
    remedy = "geotrain resume {run}"
