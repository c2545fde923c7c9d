"""The job's `sync` section: one class per strategy. What does not go together is refused here, with the reason."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from geotrain.job.base import Count, Momentum, NonNegative, Positive, Share, Spec

CodecName = Literal["fp32", "bf16", "int8", "int4", "e3m0", "topk", "sparseloco", "fedzip", "auto"]
SPARSE = ("topk", "sparseloco", "fedzip")
Every = Count | Literal["auto", "balanced"]
Rule = Literal["mean", "radial", "norm_clipped", "median", "trimmed", "flag"]


class Coded(Spec):
    """What all strategies share: how an update is written."""

    codec: CodecName = "fp32"
    """`bf16` 2x smaller, `int8` 4x, `int4` and `e3m0` 8x, `topk`, `sparseloco`, `fedzip` by what they keep. `auto`: bf16, int8 or int4,
    for each fragment and link by what the link can carry."""
    keep: Share | None = None
    """Share of numbers that a sparse codec keeps; None: 0.01 (topk), 1/64 (sparseloco), 0.1 (fedzip)."""
    feedback: Literal["ef", "dgc", "econtrol"] = "ef"
    """What becomes of what a lossy codec drops. ef: it is sent later. dgc: with momentum correction, for `topk`. econtrol: EControl."""
    feedback_decay: Share = 1.0
    """ef only: what is left of the residual after a round; 1 loses nothing, SparseLoCo takes 0.95."""
    sparse_embeddings: bool = False
    """Of embedding tables (nn.Embedding) send only the rows that a round touched. For optimizers that leave the others alone: SGD without
    momentum, Adagrad."""

    @model_validator(mode="after")
    def _codec_fits(self) -> "Coded":
        if self.keep is not None and self.codec not in SPARSE:
            raise ValueError(f"keep belongs to a sparse codec ({', '.join(SPARSE)}); {self.codec} keeps every number")
        if self.feedback == "dgc" and self.codec != "topk":
            raise ValueError("feedback: dgc corrects the momentum of what a selection by size leaves out: it needs codec: topk")
        if self.feedback == "econtrol" and self.codec in ("fp32", "auto"):
            raise ValueError(f"feedback: econtrol controls one lossy codec's error; {self.codec} is not that")
        if self.sparse_embeddings and (self.codec in (*SPARSE, "auto") or self.feedback != "ef"):
            raise ValueError("sparse_embeddings sends whole rows: it goes with fp32, bf16, int8, int4 or e3m0, and feedback: ef")
        if self.sparse_embeddings and (self.topology not in ("star", "mesh") or getattr(self, "fragments", 1) > 1):  # type: ignore[attr-defined]
            raise ValueError("sparse_embeddings needs whole tables in one piece: topology star or mesh, and no fragments")
        if self.sparse_embeddings and getattr(self, "mode", "sync") == "async":
            raise ValueError("sparse_embeddings sends what changed; mode: async sends whole replicas")
        if self.feedback_decay != 1 and (self.feedback != "ef" or self.codec == "fp32"):
            raise ValueError("feedback_decay belongs to feedback: ef of a lossy codec")
        return self


class Pushed(Coded):
    """What strategies share in which a region sends and goes on."""

    max_staleness: Count = 2
    """A region pauses rather than get more than this many rounds ahead of what it has heard."""

    @model_validator(mode="after")
    def _no_econtrol(self) -> "Pushed":
        if self.feedback == "econtrol":
            raise ValueError("feedback: econtrol keeps a mirror at the owner of a merge; a push strategy has no owner")
        return self


class Asgd(Pushed):
    """Asynchronous SGD: every inner step's update goes to the others at once. The baseline."""

    strategy: Literal["asgd"]
    topology: Literal["mesh"] = "mesh"
    """A delta counts once everywhere, so it goes from each region to every other."""


class AsgdGa(Pushed):
    """ASGD with gradient accumulation: the sum of `every` inner steps is sent, and nobody waits."""

    strategy: Literal["asgd_ga"]
    every: Every = 8
    """Inner steps between two sends, H. auto: as few as the links can carry. balanced: per region by its speed, in FedCompass's groups."""
    topology: Literal["mesh"] = "mesh"
    """A delta counts once everywhere, so it goes from each region to every other."""


class Merged(Coded):
    """What strategies share in which rounds have an agreed set of contributions."""

    merge: Rule = "mean"
    """How contributions become one. mean: by samples. radial: mean norm times mean direction. norm_clipped, median, trimmed, flag: a
    region that sends garbage cannot ruin the model."""
    quorum: Count | None = None
    """Contributions that a merge needs; None: all."""
    grace_s: NonNegative | None = None
    """How much longer a merge waits for the rest once it has its quorum; None: from the plan, half a round."""
    topology: Literal["star", "owners"] = "star"
    """star: one region merges everything. owners: each merges its share, in proportion to its bandwidth."""

    @model_validator(mode="after")
    def _merge_fits(self) -> "Merged":
        if self.quorum is not None and self.feedback == "econtrol":
            raise ValueError("feedback: econtrol needs every contribution of every round: leave quorum out")
        if self.grace_s is not None and self.quorum is None:
            raise ValueError("grace_s is how much longer than its quorum a merge waits: give a quorum")
        if self.merge in ("median", "trimmed", "flag") and self.codec in SPARSE:
            raise ValueError(
                f"merge: {self.merge} compares coordinates, and {self.codec} sends different ones from each region: use norm_clipped"
            )
        return self


class ModelAveraging(Merged):
    """MA: the parameters are averaged, weighted by samples."""

    strategy: Literal["ma"]
    every: Every = 8
    """Inner steps between two rounds, H. auto: from the plan, and anew when the links change. balanced: per region in proportion to its
    speed."""
    mode: Literal["sync", "async"] = "sync"
    """sync: a merge round for all. async: mix in what arrives, when it arrives."""
    alpha: Share | None = None
    """async only: weight of an arriving replica; None: 1 / regions. Divided by 1 + staleness."""
    max_staleness: Count | None = None
    """async only: a region pauses rather than get more than this many rounds ahead of what it has heard; None: 2."""
    topology: Literal["star", "owners", "mesh", "ring"] = "star"  # type: ignore[assignment]
    """sync: star or owners. async: star (by way of the owner), mesh (everyone to everyone) or ring (each to the next)."""

    @model_validator(mode="after")
    def _mode_fits(self) -> "ModelAveraging":
        if self.mode == "sync":
            if self.max_staleness is not None:
                raise ValueError("max_staleness belongs to mode: async; a sync merge waits for its round")
            if self.alpha is not None:
                raise ValueError("alpha belongs to mode: async; a sync merge weighs by samples")
            if self.topology in ("mesh", "ring"):
                raise ValueError(f"topology: {self.topology} has nobody to merge: it belongs to mode: async; write star or owners")
            return self
        if self.quorum is not None or self.merge != "mean":
            raise ValueError("quorum and merge belong to mode: sync; an async replica is mixed in as it arrives")
        if self.topology == "owners":
            raise ValueError("topology: owners shares the merging out, and mode: async does not merge; write mesh, star or ring")
        if self.codec not in ("fp32", "bf16", "int8") or self.feedback != "ef" or self.feedback_decay != 1:
            raise ValueError(
                f"codec: {self.codec} with feedback: {self.feedback} drops what a later update makes up for; mode: async sends whole "
                "replicas: use fp32, bf16 or int8"
            )
        return self


class DiLoCo(Merged):
    """DiLoCo: merged pseudo-gradients drive an outer Nesterov SGD (arXiv 2311.08105)."""

    strategy: Literal["diloco"]
    every: Every = 50
    """Inner steps between two rounds, H. auto: from the plan, and anew when the links change. balanced: per region in proportion to its
    speed."""
    outer_lr: Positive = 0.7
    outer_momentum: Momentum = 0.9


class Streaming(Merged):
    """Streaming DiLoCo (arXiv 2501.18512): a fragment at a time, applied while training goes on."""

    strategy: Literal["streaming"]
    every: Count = 48
    """Inner steps between two turns of a fragment, H; a multiple of `fragments`."""
    fragments: Count = 4
    """Parts of the model, each at its own turn."""
    overlap_steps: Annotated[int, Field(ge=0)] | None = None
    """Inner steps between a fragment's turn and the use of its merge, tau; less than every / fragments. None: from the plan, as many as
    the exchange takes."""
    mix: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """alpha: how much of the local parameters stays when a merge is used; 0 takes the merge alone."""
    outer_lr: Positive = 0.4
    outer_momentum: Momentum = 0.9

    @model_validator(mode="after")
    def _turns_fit(self) -> "Streaming":
        if self.every % self.fragments:
            raise ValueError(f"every: {self.every} is not a multiple of fragments: {self.fragments}, so turns would drift")
        if self.overlap_steps is not None and self.overlap_steps >= self.every // self.fragments:
            raise ValueError(
                f"overlap_steps: {self.overlap_steps} must be less than every / fragments = {self.every // self.fragments}: "
                "a merge is used before the next turn"
            )
        return self


class Delayed(Merged):
    """One round delayed (after CO2, arXiv 2401.16265): a whole round hides the exchange of the one before."""

    strategy: Literal["delayed"]
    every: Every = 32
    """Inner steps between two rounds, H. auto: from the plan, as many as the exchange takes. balanced: per region in proportion to its
    speed."""
    outer_lr: Positive = 0.7
    outer_momentum: Momentum = 0.5
    momentum_clip: Positive | None = None
    """The outer momentum of each coordinate stays within plus and minus this."""
    staleness_penalty: NonNegative = 1.0
    """A merge is divided by 1 + penalty * (1 - cos) / 2, cos being its cosine with the merge before."""

    @model_validator(mode="after")
    def _clip_has_momentum(self) -> "Delayed":
        if self.momentum_clip is not None and self.outer_momentum == 0:
            raise ValueError("momentum_clip bounds the outer momentum, and outer_momentum is 0")
        return self


Sync = Annotated[Asgd | AsgdGa | ModelAveraging | DiLoCo | Streaming | Delayed, Field(discriminator="strategy")]
