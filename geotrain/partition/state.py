"""A seat's state as named tensors and JSON-able facts, and back: what a checkpoint part holds."""

from typing import Any

import torch
from torch import Tensor

from geotrain.partition.flat import FlatModel


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts) of an inner optimizer, keyed `parameter/slot`; facts hold the slots that are plain numbers.

    `groups` of the facts: the numbers of each parameter group, as the learning rate, which a task may change while it trains.
    """
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for parameter, slots in optimizer.state.items():
        for slot, value in slots.items():
            key = f"{names[id(parameter)]}/{slot}"
            if isinstance(value, Tensor):
                tensors[key] = value
            elif value is not None:
                facts[key] = value
    groups = [{name: value for name, value in group.items() if isinstance(value, int | float)} for group in optimizer.param_groups]
    return tensors, {**facts, "groups": groups}


def about_bytes(optimizer: torch.optim.Optimizer, flat: FlatModel, outer: Tensor | None) -> int:
    """Of a checkpoint part: the model, what all agree on or know of it, the inner optimizer as it is now, and the outer one's momentum."""
    slots = [value for slots in optimizer.state.values() for value in slots.values() if isinstance(value, Tensor)]
    return 2 * flat.vector.nbytes + sum(slot.nbytes for slot in [*slots, *([] if outer is None else [outer])])


def load_optimizer_state(optimizer: torch.optim.Optimizer, flat: FlatModel, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Give an optimizer, fresh from the task, the slots that it had. Step counters stay on the CPU, as torch keeps them."""
    parameters = dict(flat.model.named_parameters())
    slots = {key: value for key, value in facts.items() if key != "groups"}
    for group, numbers in zip(optimizer.param_groups, facts.get("groups", ()), strict=False):
        group.update(numbers)
    for key, value in {**tensors, **slots}.items():
        name, _, slot = key.rpartition("/")
        parameter = parameters[name]
        on_device = isinstance(value, Tensor) and value.shape == parameter.shape
        optimizer.state[parameter][slot] = value.to(parameter.device) if on_device else value


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}
