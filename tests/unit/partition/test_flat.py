import pytest
import torch
from torch import nn

from geotrain.partition.flat import FlatModel
from geotrain.partition.state import load_optimizer_state, optimizer_state

CPU = torch.device("cpu")


class Tied(nn.Module):
    """A shared weight, a frozen one, BatchNorm's buffers, and a buffer that is not state."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("mask", torch.full((4,), float("-inf")), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.b(torch.tanh(self.a(x))))


def trained(flat: FlatModel, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        flat.model(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()


def test_parameters_come_first_buffers_after_and_shared_ones_once() -> None:
    flat = FlatModel(Tied(), CPU)
    assert [slot.name for slot in flat.slots] == ["a.weight", "b.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"]
    assert flat.parameters == 16 + 4 + 4 + 4
    assert flat.vector.numel() == flat.parameters + 8
    assert flat.model.b.weight is flat.model.a.weight


def test_training_a_flat_model_is_training_the_model() -> None:
    torch.manual_seed(0)
    model, twin = Tied(), Tied()
    twin.load_state_dict(model.state_dict())
    flat = FlatModel(model, CPU)
    trained(flat, torch.optim.AdamW(flat.model.parameters()), 5)
    optimizer = torch.optim.AdamW(twin.parameters())
    for step in range(5):
        optimizer.zero_grad()
        twin(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
    for name, tensor in twin.state_dict().items():
        assert torch.equal(tensor, flat.model.state_dict()[name]), name


def test_the_vector_is_the_model() -> None:
    flat = FlatModel(Tied(), CPU)
    flat.vector.fill_(0.5)
    assert flat.model.a.weight[0, 0] == 0.5
    assert flat.model.norm.running_var[0] == 0.5
    trained(flat, torch.optim.SGD(flat.model.parameters(), lr=0.1), 1)
    assert torch.equal(flat.named(flat.vector)["norm.running_mean"], flat.model.norm.running_mean)
    assert flat.vector[-1] != 0.5


def test_flat_gradients_are_the_gradients() -> None:
    flat = FlatModel(Tied(), CPU)
    gradients = flat.flatten_gradients()
    flat.model(torch.randn(8, 4)).square().sum().backward()
    assert torch.equal(gradients[:16].view(4, 4), flat.model.a.weight.grad)
    assert gradients[:-1].abs().sum() > 0
    assert gradients[-1] == 0


def test_a_half_precision_model_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"a\.weight is torch\.float16"):
        FlatModel(Tied().half(), CPU)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.optim.RMSprop])
def test_an_optimizer_goes_on_as_if_nothing_had_been(kind) -> None:
    torch.manual_seed(0)
    first, second = FlatModel(Tied(), CPU), FlatModel(Tied(), CPU)
    optimizer = kind(first.model.parameters())
    trained(first, optimizer, 3)
    optimizer.param_groups[0]["lr"] *= 0.5  # as a task may
    tensors, facts = optimizer_state(optimizer, first.parameter_names())
    second.vector.copy_(first.vector)
    again = kind(second.model.parameters())
    load_optimizer_state(again, second, {name: tensor.clone() for name, tensor in tensors.items()}, facts)
    trained(first, optimizer, 2)
    trained(second, again, 2)
    assert torch.equal(first.vector, second.vector)


def test_fingerprints_and_hashes_are_by_name() -> None:
    torch.manual_seed(0)
    one = FlatModel(Tied(), CPU)
    torch.manual_seed(0)
    two = FlatModel(Tied(), CPU)
    assert one.hashes() == two.hashes()
    two.named(two.vector)["b.bias"].add_(1)
    assert {name for name in one.hashes() if one.hashes()[name] != two.hashes()[name]} == {"b.bias"}
    assert one.fingerprint()["a.weight"] == "[4, 4] float32"
