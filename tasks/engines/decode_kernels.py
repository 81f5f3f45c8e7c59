"""The kernels of the decode engine for GPUs: native/decode.cu, compiled when first used.

    outputs = multiply(layer, inputs)  # a DeltaLinear; inputs [tokens, columns]
    weight = expand(layer)  # [rows, columns]

NVIDIA's run-time compiler comes with torch, as do its Python bindings: no CUDA toolkit is needed.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tasks.engines.decode_gpu import DeltaLinear

SOURCE = Path(__file__).parent / "native" / "decode.cu"
MOST_TOKENS = 8  # at once: as many sums as a thread holds


def multiply(layer: DeltaLinear, inputs: Tensor) -> Tensor:
    """inputs W^T + bias. A CUDA graph can capture it: nothing waits for the device.

    Args:
        layer: W [rows, columns] and its bias
        inputs: [tokens, columns], contiguous, on the layer's device and of its dtype

    Returns:
        [tokens, rows], accumulated in float32
    """
    num_tokens, num_columns = inputs.shape
    limit = shared_bytes(inputs.device.index)
    block = min(1 << (num_tokens - 1).bit_length(), MOST_TOKENS)
    while block > 1 and 2 * block * num_columns > limit:
        block //= 2
    wide = block == 1 and 4 * num_columns <= limit
    shared = max(num_columns * (4 if wide else 2 * block), 4 * block * layer.rows * layer.parts)
    outputs = torch.empty(num_tokens, layer.out_features, dtype=layer.dtype, device=inputs.device)
    sizes = layer.out_features, num_columns, num_tokens
    grid = len(layer.lengths), -(-num_tokens // block)
    options = f"-DTOKENS={block}", f"-DWIDE={int(wide)}"
    _launch(layer, "multiply", options, grid, shared, [inputs, layer.bias, outputs], sizes)
    return outputs


def expand(layer: DeltaLinear) -> Tensor:
    """The dense weight [rows, columns]; a zero of either sign becomes +0."""
    shape = (layer.out_features, layer.in_features)
    weight = torch.zeros(shape, dtype=layer.dtype, device=layer.stream.device)
    options = "-DTOKENS=1", "-DWIDE=1"
    _launch(layer, "expand", options, (len(layer.lengths), 1), 0, [weight], shape[1:])
    return weight


@cache
def shared_bytes(device: int) -> int:
    """Of memory that the threads of a group can share, on a device."""
    properties = torch.cuda.get_device_properties(device)
    limit: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return limit


def compiled(options: tuple[str, ...], capability: tuple[int, int]) -> bytes:
    """The kernels as a cubin. Raises RuntimeError with the compiler's words."""
    from cuda.bindings import nvrtc

    program = _done(nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), b"decode.cu", 0, [], []))
    flags = [f"-arch=sm_{capability[0]}{capability[1]}", "-std=c++17", "-default-device", *options]
    encoded = [flag.encode() for flag in flags]
    if nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)[0].value:
        log = bytearray(_done(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"decode.cu does not compile: {log.decode()}")
    cubin = bytearray(_done(nvrtc.nvrtcGetCUBINSize(program)))
    _done(nvrtc.nvrtcGetCUBIN(program, cubin))
    return bytes(cubin)


def _launch(
    layer: DeltaLinear,
    name: str,
    options: tuple[str, ...],
    grid: tuple[int, int],
    shared: int,
    tensors: list[Tensor | None],
    sizes: tuple[int, ...],
) -> None:
    from cuda.bindings import driver

    device = layer.stream.device.index
    options += (
        f"-DBF16={int(layer.dtype == torch.bfloat16)}",
        f"-DStart={'short' if layer.starts.dtype == torch.int16 else 'int'}",
        f"-DROWS={layer.rows}",
        f"-DPARTS={layer.parts}",
    )
    held = [layer.stream, layer.starts, layer.offsets, layer.lengths, layer.order, *tensors]
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in held]
    types = [ctypes.c_void_p] * len(pointers) + [ctypes.c_int] * len(sizes)
    with torch.cuda.device(device):
        kernel = _kernel(name, options, device)
        stream = torch.cuda.current_stream().cuda_stream
        arguments = ((*pointers, *sizes), tuple(types))
        threads = layer.rows * layer.parts
        _done(driver.cuLaunchKernel(kernel, *grid, 1, threads, 1, 1, shared, stream, arguments, 0))


@cache
def _kernel(name: str, options: tuple[str, ...], device: int) -> Any:
    from cuda.bindings import driver

    module = _module(options, device)
    kernel = _done(driver.cuModuleGetFunction(module, name.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _done(driver.cuFuncSetAttribute(kernel, attribute, shared_bytes(device)))
    return kernel


@cache
def _module(options: tuple[str, ...], device: int) -> Any:
    from cuda.bindings import driver

    return _done(
        driver.cuModuleLoadData(compiled(options, torch.cuda.get_device_capability(device)))
    )


def _done(answer: tuple[Any, ...]) -> Any:
    """What a call of NVIDIA's gave. Raises RuntimeError where it failed."""
    error, *values = answer
    if error.value:
        raise RuntimeError(f"CUDA: {error.name}")
    return values[0] if values else None
