"""A model laid out in one vector: [trainable parameters..., persistent floating-point buffers...]."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a named tensor lies in the vector."""

    name: str
    start: int
    shape: torch.Size

    @property
    def stop(self) -> int:
        return self.start + self.shape.numel()


class FlatModel:
    """The model's tensors become views of `vector`, so that exchanging it copies nothing that training does not use.

    Raises ValueError for a trainable parameter that is not fp32: master parameters are, whatever precision computes with.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model.to(device)
        owners = dict(_owners(self.model))
        tensors = {name: getattr(module, leaf) for name, (module, leaf) in owners.items()}
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32:
                raise ValueError(f"{name} is {tensor.dtype}; keep the model in fp32 and set train.precision: bf16 for speed")
        slots, start = [], 0
        for name, tensor in tensors.items():
            slots.append(Slot(name, start, tensor.shape))
            start += tensor.numel()
        self.slots = tuple(slots)
        self.vector = torch.empty(start, device=device)
        self.parameters = sum(t.numel() for t in tensors.values() if isinstance(t, nn.Parameter))
        """Elements that are parameters; they come first."""
        for slot in self.slots:
            module, leaf = owners[slot.name]
            view = self._view(self.vector, slot)
            view.copy_(tensors[slot.name].detach())
            if isinstance(tensors[slot.name], nn.Parameter):
                tensors[slot.name].data = view
            else:
                module._buffers[leaf] = view
        self.tables = tuple(
            (slot.start, slot.shape[0], slot.shape[1]) for slot in self.slots if isinstance(owners[slot.name][0], nn.Embedding)
        )
        """Embedding tables in the vector: (start, rows, width)."""
        self.gradients: Tensor | None = None

    def _view(self, vector: Tensor, slot: Slot) -> Tensor:
        return vector[slot.start : slot.stop].view(slot.shape)

    def parameter_names(self) -> dict[int, str]:
        """id(parameter) -> name, for naming an optimizer's state."""
        return {id(parameter): name for name, parameter in self.model.named_parameters()}

    def flatten_gradients(self) -> Tensor:
        """Let all gradients live in one vector, with one element to spare at its end; for summing them over workers."""
        self.gradients = torch.zeros(self.parameters + 1, device=self.vector.device)
        named = dict(self.model.named_parameters())
        for slot in self.slots:
            if slot.name in named:
                named[slot.name].grad = self._view(self.gradients, slot)
        return self.gradients

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector of this layout as named tensors, sharing its memory."""
        return {slot.name: self._view(vector, slot) for slot in self.slots}

    def fingerprint(self) -> dict[str, str]:
        """Shape and type of everything in the state_dict, frozen parameters too."""
        return {name: f"{list(tensor.shape)} {str(tensor.dtype)[6:]}" for name, tensor in self.model.state_dict().items()}

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every floating-point tensor in the state_dict, frozen parameters too; counters are each region's own."""
        return {name: sha256(tensor) for name, tensor in self.model.state_dict().items() if tensor.is_floating_point()}

    def state_dict(self) -> dict[str, Tensor]:
        """For publishing: the model's own state_dict, on the CPU, each tensor in memory of its own."""
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self.model.state_dict().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take published values; the views stay. Raises RuntimeError from torch when names or shapes differ."""
        self.model.load_state_dict(state)


def _owners(model: nn.Module) -> list[tuple[str, tuple[nn.Module, str]]]:
    """(name, (module, attribute)): trainable parameters, then persistent floating-point buffers; a shared tensor once."""
    parameters, buffers, seen = [], [], set[int]()
    for prefix, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                parameters.append((f"{prefix}.{leaf}".lstrip("."), (module, leaf)))
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and leaf not in module._non_persistent_buffers_set:
                buffers.append((f"{prefix}.{leaf}".lstrip("."), (module, leaf)))
    return parameters + buffers


def sha256(tensor: Tensor) -> str:
    """Of a tensor's values, hex."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
