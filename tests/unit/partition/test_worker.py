import pytest
import torch

from geotrain.errors import TaskFailed
from geotrain.partition.worker import device_fault


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: str(error)[:10],
)
def test_a_device_is_blamed_for_what_it_raises_and_for_what_the_task_raised_for_it(error: Exception) -> None:
    assert (device_fault(error) or "").startswith(type(error).__name__)
    failed = TaskFailed("north", "loss or backward", "")
    failed.__cause__ = error
    assert device_fault(failed) == device_fault(error)


def test_a_task_is_blamed_for_its_own() -> None:
    assert device_fault(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert device_fault(TaskFailed("north", "loss or backward", "")) is None
