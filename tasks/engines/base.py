"""What an engine is: it says whether it can run a layer, and makes the module that runs it.

    engine = ENGINES["bitmask"]
    engine.refusal(weight.device, weight.dtype) or engine.misfit(weight)  # "" or why not
    layer = engine.encode(weight, bias)  # called like nn.Linear

Engines are made without a compiler and without a GPU; what they lack, `refusal` says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

# What a model is converted for: generating token by token, or reading many tokens (or images).
Use = Literal["decode", "prefill"]


_NAMES = {
    "cpu": "CPUs",
    "cuda": "NVIDIA GPUs",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


class EncodedLinear(nn.Module, ABC):
    """Stands in for an nn.Linear of the same weight; inference only.

    A subclass keeps the weight in buffers, so that `state_dict` and `to` work as usual (or is an
    `OpaqueLinear`), and its bias as the buffer `bias` (or None). `weight` must give the dense
    matrix, out x in, for models that look at it.
    """

    def __init__(self, shape: Sequence[int], bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias: Tensor | None
        # A copy: one number of a mapped file keeps all of the file.
        own = None if bias is None else bias.detach().clone(memory_format=torch.contiguous_format)
        self.register_buffer("bias", own)

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The dense weight, out x in, made anew at every call."""

    @property
    def encoded_bytes(self) -> int:
        """Bytes that the matrix takes in memory, without the bias."""
        return sum(held.nbytes for name, held in self.named_buffers() if name != "bias")

    def rows_of(self, x: Tensor, held: Tensor, dtype: torch.dtype) -> Tensor:
        """x, ... x in, as tokens x in, for kernels that check nothing.

        Raises ValueError for a wrong number of inputs, TypeError where x or the bias is not of
        the weight's dtype or not on the device of `held`, a buffer of the weight.
        """
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"inputs of shape {tuple(x.shape)} for {self.in_features} columns")
        for what, tensor in (("inputs", x), ("a bias", self.bias)):
            if tensor is not None and (tensor.dtype, tensor.device) != (dtype, held.device):
                raise TypeError(
                    f"{what} of {tensor.dtype} on {tensor.device} for a weight of {dtype} on "
                    f"{held.device}"
                )
        return x.reshape(-1, self.in_features)

    def extra_repr(self) -> str:
        """As nn.Linear's, with the bytes."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, encoded_bytes={self.encoded_bytes}"
        )


class OpaqueLinear(EncodedLinear):
    """Keeps its weight as `opaque`, which torch can neither save nor copy; the dense one can be."""

    opaque: Any

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape, bias)
        self.set_extra_state(weight.detach())

    @property
    def weight(self) -> Tensor:
        """The dense weight, out x in, made anew at every call."""
        dense: Tensor = self.opaque.to_dense()
        return dense

    def get_extra_state(self) -> Tensor:
        """The dense weight, as `state_dict` keeps it."""
        return self.weight

    @abstractmethod
    def set_extra_state(self, state: Tensor) -> None:
        """Make `opaque` of a dense weight."""

    def __getstate__(self) -> dict[str, Any]:
        """For copying and pickling."""
        return {**self.__dict__, "opaque": self.weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From such a copy."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.set_extra_state(state["opaque"])


class Engine(ABC):
    """One way to run linear layers."""

    name: str
    baseline = False  # it multiplies by zeros as well: what the others are compared with
    device = ""  # the type that it runs on; empty: any
    dtypes: tuple[torch.dtype, ...] = ()  # empty: all

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        """Empty where the engine runs here, else one line that says why not."""
        if self.device and device.type != self.device:
            return f"{self.name} runs on {_NAMES[self.device]}, not on {device.type}"
        if self.dtypes and dtype not in self.dtypes:
            known = " and ".join(_NAMES[known] for known in self.dtypes)
            return f"{self.name} runs {known}, not {dtype}"
        return self.lacks(device, dtype)

    def lacks(self, device: torch.device, dtype: torch.dtype) -> str:
        """What of a device of the right type the engine does without; empty: nothing."""
        return ""

    def misfit(self, weight: Tensor) -> str:
        """Empty where the engine can hold a weight, out x in, else one line that says why not."""
        return ""

    @abstractmethod
    def break_even(self, dtype: torch.dtype, use: Use) -> float:
        """The share of zeros from which encoding a matrix is faster than its dense kernel."""

    @abstractmethod
    def encode(self, weight: Tensor, bias: Tensor | None) -> EncodedLinear:
        """The module that computes x @ weight.T + bias. weight: out x in; not changed."""


def lacks_ampere(name: str, device: torch.device) -> str:
    """Of a CUDA device: why it is no NVIDIA GPU from Ampere, or empty."""
    if torch.version.cuda is None:
        return f"{name} runs on NVIDIA GPUs, which this torch does not"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{name} needs an NVIDIA GPU of compute capability 8.0 or later"
    return ""
