"""Run: one execution of a job as the control plane holds it, stage after stage."""

from geotrain.run.conduct import InThreads, locate_and_plan, train_and_publish
from geotrain.run.run import Run, hand_over, taken_over

__all__ = ["InThreads", "Run", "hand_over", "locate_and_plan", "taken_over", "train_and_publish"]
