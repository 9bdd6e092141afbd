"""Arrays of the library that a caller uses: torch, NumPy or CuPy."""

from __future__ import annotations

import sys
from typing import Any, Callable

_TORCH = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8_e4m3": "float8_e4m3fn",
          "int32": "int32", "int64": "int64", "uint8": "uint8"}


def is_torch(array: Any) -> bool:
    return hasattr(array, "data_ptr")


def _numpy_dtype(name: str):
    if name in ("bfloat16", "float8_e4m3fn"):
        import ml_dtypes  # NumPy has none of its own; whoever has such arrays has this

        return getattr(ml_dtypes, name)
    return name


def allocator_like(array: Any) -> Callable[[str, str, tuple], Any]:
    """Gives arrays of the library, and on the device, that `array` is of."""
    if is_torch(array):
        torch = sys.modules["torch"]
        device = array.device
        return lambda name, dtype, shape: torch.empty(
            shape, dtype=getattr(torch, _TORCH[dtype]), device=device)
    if hasattr(array, "__cuda_array_interface__"):
        import cupy

        return lambda name, dtype, shape: cupy.empty(shape, dtype=_numpy_dtype(_TORCH[dtype]))
    import numpy

    return lambda name, dtype, shape: numpy.empty(shape, dtype=_numpy_dtype(_TORCH[dtype]))


def take(view: Any, like: Any, dtype: str) -> Any:
    """An array of the library of `like` over memory of expertwire's; None for None."""
    if view is None:
        return None
    if is_torch(like):
        return sys.modules["torch"].from_dlpack(view)
    if hasattr(like, "__cuda_array_interface__"):
        import cupy

        return cupy.from_dlpack(view)
    import numpy

    try:
        return numpy.from_dlpack(view)
    except (RuntimeError, BufferError, TypeError) as error:
        raise TypeError(f"NumPy has no {dtype}: rows of a pool of this dtype cannot be given as an "
                        "array of NumPy; use owned output, or torch") from error
