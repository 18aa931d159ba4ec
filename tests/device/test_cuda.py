"""Against functions that are called as C functions are; no GPU and no CUDA is needed."""

from __future__ import annotations

import numpy as np
import pytest

from rowcol_edge.device import cuda
from rowcol_edge.device.cuda import Cuda
from rowcol_edge.errors import BundleError

from .fake_nvidia import Libcudart


def test_an_array_goes_to_the_gpu_and_back() -> None:
    library = Libcudart()
    gpu = Cuda(0, library)
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    stream, pointer = gpu.stream(), gpu.allocate(array.nbytes)
    back = np.zeros_like(array)
    gpu.upload(pointer, array, stream)
    gpu.download(back, pointer, stream)
    gpu.synchronize(stream)
    np.testing.assert_array_equal(back, array)
    gpu.free(pointer)
    gpu.destroy(stream)
    assert (library.memory, library.streams) == ({}, set())
    assert not [call for call in library.calls if call.startswith("misuse")]


def test_a_gpu_is_known_by_its_name_and_capability() -> None:
    gpu = Cuda(0, Libcudart(name=b"Orin (nvgpu)", capability=(8, 7)))
    assert (gpu.name(), gpu.capability()) == ("Orin (nvgpu)", "8.7")


@pytest.mark.parametrize(("count", "device"), [(0, 0), (1, 1)])
def test_a_gpu_that_is_not_there_is_named(count: int, device: int) -> None:
    with pytest.raises(BundleError, match=rf"device cuda:{device}: expected one of {count} GPU\(s\)"):
        Cuda(device, Libcudart(devices=count))


def test_a_call_that_fails_says_which_and_why() -> None:
    library = Libcudart()
    gpu = Cuda(0, library)
    library.fail["cudaMalloc"] = 2
    with pytest.raises(
        BundleError, match="CUDA: cudaMalloc: expected a call that succeeds, got error 2, out of memory"
    ):
        gpu.allocate(10)


def test_a_machine_without_cuda_gets_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_LIBRARIES", ("libcudart.so.0",))
    with pytest.raises(BundleError, match=r"the CUDA runtime library: expected one of libcudart\.so\.0, got none"):
        Cuda(0)
