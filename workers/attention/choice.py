"""Which attention backend a device takes. Triton is imported only where there is a GPU to run it."""

from __future__ import annotations

import logging

import torch

from kvstore.layout import UNQUANTISED
from workers.attention.step import AttentionBackend
from workers.attention.torch_backend import TorchBackend

FP8_CAPABILITY = (8, 9)  # of a GPU, from which on it converts fp8 e4m3

log = logging.getLogger(__name__)


class TritonMissing(ValueError):
    """A GPU is to be used, and the package that compiles its kernels is not installed. Says what to install."""


def backend_for(device: torch.device, kv_dtype: str = UNQUANTISED) -> AttentionBackend:
    """The Triton backend on a CUDA device, else the torch backend.

    A GPU that knows no fp8 takes the torch backend for such K/V, without graphs, and the log says so.

    Args:
        kv_dtype: one of `kvstore.layout.KV_DTYPES`, what K/V is stored as.

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
    if kv_dtype == "fp8_e4m3" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        log.warning("this GPU has no fp8: attention is slow and runs without graphs; set engine.kv_dtype to int8")
        return TorchBackend()
    return TritonBackend()
