"""The few functions of CUDA's runtime library that moving arrays to a GPU and back takes, through ctypes.

https://docs.nvidia.com/cuda/cuda-runtime-api/ describes each of them.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from ..errors import BundleError

_LIBRARIES = ("libcudart.so.12", "libcudart.so.11.0", "libcudart.so", "/usr/local/cuda/lib64/libcudart.so")
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # cudaDeviceAttr
_NAME_BYTES, _PROPERTIES_BYTES = 256, 8192
"""cudaDeviceProp begins with the name; the rest differs between versions and is not read."""

_POINTER, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cudaGetDeviceCount": (ctypes.POINTER(_INT),),
    "cudaSetDevice": (_INT,),
    "cudaDeviceGetAttribute": (ctypes.POINTER(_INT), _INT, _INT),
    "cudaGetDeviceProperties": (_POINTER, _INT),
    "cudaMalloc": (ctypes.POINTER(_POINTER), _SIZE),
    "cudaFree": (_POINTER,),
    "cudaMemcpyAsync": (_POINTER, _POINTER, _SIZE, _INT, _POINTER),
    "cudaStreamCreate": (ctypes.POINTER(_POINTER),),
    "cudaStreamSynchronize": (_POINTER,),
    "cudaStreamDestroy": (_POINTER,),
}


class Cuda:
    """One GPU. Addresses and streams are plain integers, which is what TensorRT takes.

    BundleError: a call that fails, by the name of its function and CUDA's own words.
    """

    def __init__(self, device: int, library: Any = None) -> None:
        self._library = _load() if library is None else library
        for name, arguments in _FUNCTIONS.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, _INT
        self._library.cudaGetErrorString.argtypes = (_INT,)
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        count = _INT()
        self._call("cudaGetDeviceCount", ctypes.byref(count))
        if device >= count.value:
            raise BundleError(f"device cuda:{device}", expected=f"one of {count.value} GPU(s)", got="no such device")
        self._call("cudaSetDevice", device)
        self.device = device

    def name(self) -> str:
        """The GPU's own, such as ``Orin``."""
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        self._call("cudaGetDeviceProperties", properties, self.device)
        return properties.raw[:_NAME_BYTES].partition(b"\0")[0].decode("utf-8", "replace")

    def capability(self) -> str:
        """Compute capability, such as ``8.7``."""
        values = []
        for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
            value = _INT()
            self._call("cudaDeviceGetAttribute", ctypes.byref(value), attribute, self.device)
            values.append(str(value.value))
        return ".".join(values)

    def allocate(self, size_bytes: int) -> int:
        pointer = _POINTER()
        self._call("cudaMalloc", ctypes.byref(pointer), size_bytes)
        return pointer.value or 0

    def free(self, pointer: int) -> None:
        self._call("cudaFree", pointer)

    def stream(self) -> int:
        pointer = _POINTER()
        self._call("cudaStreamCreate", ctypes.byref(pointer))
        return pointer.value or 0

    def destroy(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def upload(self, pointer: int, array: np.ndarray, stream: int) -> None:
        """Begin a copy to the GPU; the array is contiguous and lives until `synchronize`."""
        self._call("cudaMemcpyAsync", pointer, array.ctypes.data, array.nbytes, _TO_DEVICE, stream)

    def download(self, array: np.ndarray, pointer: int, stream: int) -> None:
        """Begin a copy from the GPU; the array is complete after `synchronize`."""
        self._call("cudaMemcpyAsync", array.ctypes.data, pointer, array.nbytes, _TO_HOST, stream)

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = self._library.cudaGetErrorString(code).decode("utf-8", "replace")
            raise BundleError(f"CUDA: {name}", expected="a call that succeeds", got=f"error {code}, {text}")


def _load() -> Any:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BundleError(
        "the CUDA runtime library",
        expected=f"one of {', '.join(_LIBRARIES)}",
        got="none that loads",
        hint="on JetPack install it with: sudo apt-get install nvidia-jetpack-runtime",
    )
