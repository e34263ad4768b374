"""Which attention backend a device takes. Triton is imported only where there is a GPU to run it."""

from __future__ import annotations

import torch

from workers.attention.step import AttentionBackend
from workers.attention.torch_backend import TorchBackend


class TritonMissing(ValueError):
    """A GPU is to be used, and the package that compiles its kernels is not installed. Says what to install."""


def backend_for(device: torch.device) -> AttentionBackend:
    """The Triton backend on a CUDA device, else the torch backend.

    Raises:
        TritonMissing: see there.
    """
    if device.type != "cuda":
        return TorchBackend()
    try:
        from workers.attention.triton_backend import TritonBackend
    except ImportError as error:
        raise TritonMissing(
            f"attention on a GPU needs triton, which cannot be imported ({error}); run pip install 'triton>=3.6' (the"
            " extra gpu), or set device to cpu"
        ) from error
    return TritonBackend()
