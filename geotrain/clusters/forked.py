"""Imported by the process that local workers are forked from (Python's fork server), and by no other.

It leaves the flow's process group, as they do (`detach`): a signal to the group would end it, and Dask would take its workers for lost.
It computes nothing, since threads that torch begins for that are not there after a fork.
"""

import importlib
import os

os.setpgrp()
os.environ.pop("PYTHONSAFEPATH", None)  # it has done its work: a worker's own children begin as the flow's do

import torch  # noqa: E402

torch.optim.SGD([torch.zeros(1)], lr=0.1)  # with its first optimizer torch imports its compiler, for a second
importlib.import_module("geotrain.partition.worker")  # what runs on a cluster, and above it: by name
