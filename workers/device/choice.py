"""Which device computes a model's steps."""

from __future__ import annotations

import torch

from workers.device.cpu import CpuDevice
from workers.device.cuda import CudaDevice
from workers.device.interface import Device


def device_of(torch_device: torch.device) -> Device:
    """Of the model that lies there; its queue is the compute stream of the thread that asks."""
    return CudaDevice(torch_device) if torch_device.type == "cuda" else CpuDevice()
