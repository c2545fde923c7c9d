"""Run: one execution of a job as the control plane holds it, stage after stage."""

from geotrain.run.run import Run, hand_over, taken_over

__all__ = ["Run", "hand_over", "taken_over"]
