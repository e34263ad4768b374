"""What the hardware would allow: the least time to read the bytes and to make the products of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.gpu_chips import chip_of
from bench.gpu_rig import GpuRig

REACHED = 0.8  # share of the peak products that large matrix products reach (798 of 989 TFLOP/s seen on an H100)
BUS_GB_S = 55.0  # of page-locked copies over PCIe 5 x16 in one direction


@dataclass(frozen=True, slots=True)
class Floors:
    """Of one model on one device.

    Attributes:
        peak_gb_s: bandwidth of the device's memory. peak_tflop_s: dense, half precision. bus_gb_s: to host.
        weights_nbytes: read by every step. products: multiplications and additions a token, without attention.
        token_nbytes: of K/V. attention: products of one query row over one key, all layers and heads.
    """

    peak_gb_s: float
    peak_tflop_s: float
    bus_gb_s: float
    weights_nbytes: int
    products: float
    token_nbytes: int
    attention: float

    @classmethod
    def of(cls, rig: GpuRig) -> Floors:
        """Of a rig's model and its device; peaks of an unknown device are those of an H100."""
        name = torch.cuda.get_device_name() if rig.runner.device.type == "cuda" else ""
        chip = chip_of(name)
        config, model = rig.scale.config, rig.runner.model
        embedding = int(config["vocab_size"]) * int(config["hidden_size"])
        parameters = sum(each.numel() for each in model.parameters()) - embedding  # of which a row a token is read
        layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        itemsize = next(model.parameters()).element_size()
        return cls(
            peak_gb_s=chip.bandwidth / 1e9,
            peak_tflop_s=chip.flops / 1e12,
            bus_gb_s=BUS_GB_S,
            weights_nbytes=parameters * itemsize,
            products=2.0 * (parameters - embedding),  # logits of the last row only
            token_nbytes=rig.device.layout.token_nbytes,
            attention=4.0 * layers * heads * rig.device.layout.k_dim,
        )

    @property
    def weights_ms(self) -> float:
        """To read every weight once."""
        return self.weights_nbytes / self.peak_gb_s / 1e6

    def loaded_ms(self, tokens: int) -> float:
        """To bring so many tokens' K/V from host, and then to read every weight once for what follows them."""
        return tokens * self.token_nbytes / self.bus_gb_s / 1e6 + self.weights_ms

    def decode_tok_s(self, batch: int, context: int) -> float:
        """Weights once and all K/V once a step."""
        nbytes = self.weights_nbytes + batch * context * self.token_nbytes
        return batch * self.peak_gb_s * 1e9 / nbytes

    def prefill_tok_s(self, tokens: int) -> float:
        """All products of a prompt without a cached prefix, at the rate that large matrix products reach."""
        total = self.products * tokens + self.attention * tokens * tokens / 2
        return tokens * self.peak_tflop_s * 1e12 * REACHED / total
