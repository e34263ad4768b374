"""A model whose every row is computed in one fixed way, whatever else its step holds: the canonical mode.

Covers: cutting a packed step into forwards of known sizes and filling them up. The same floats, on one kind of machine,
for any cut of a prompt into chunks, any cached prefix, any companions, and for a token that was generated as for the
same token in a prompt: so a block that decoding wrote is the block that a prefill writes. Does not cover: attention
(`attention.exact_backend`), what makes this true on the machine at hand (`check`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workers.attention.exact_backend import ExactBackend
from workers.attention.step import AttentionBackend, KVViews, Span, make_step
from workers.canonical.check import find_sizes, refuse_mixed_rows
from workers.canonical.products import shapes_of
from workers.canonical.rows import CPU_ANCHOR, CPU_SIZES, CUDA_ANCHOR, CUDA_SIZES, Part, padded, parts, spans_of
from workers.model_folder import ModelFolder
from workers.models import ModelRunner


class CanonicalRunner(ModelRunner):
    """See the module and `ModelRunner`.

    Attributes:
        sizes: rows that a forward may have. kernels: 32 bytes that stand for the floats of this machine; part of the
        fingerprint, so that workers whose machines round differently share no block.
    """

    def __init__(
        self,
        model: Any,
        folder: ModelFolder,
        fingerprint: bytes,
        backend: AttentionBackend | None = None,
        *,
        whole: Tensor | None = None,
    ) -> None:
        """Take a model loaded with our attention, probe it, and find the sizes at which its rows agree.

        `backend` is not heard: `ExactBackend` alone keeps the promise.

        Raises:
            ModelNotSupported: see `ModelRunner.load`.
            NotDeterministic: this model, or this machine, cannot keep the promise.
        """
        exact = ExactBackend()
        cuda = torch.device(model.device).type == "cuda"
        anchor, candidates = (CUDA_ANCHOR, CUDA_SIZES) if cuda else (CPU_ANCHOR, CPU_SIZES)
        self.sizes: Sequence[int] = (anchor,)
        super().__init__(model, folder, fingerprint, exact, whole=whole)
        refuse_mixed_rows(lambda: self._probe(model.config.get_text_config()))
        self.sizes, self.kernels = find_sizes(self, exact, anchor, candidates, shapes_of(model))
        self.fingerprint = hashlib.sha256(b"warmkv canonical\0" + fingerprint + self.kernels).digest()

    @torch.inference_mode()
    def forward(
        self,
        kv: KVViews,
        spans: Sequence[Span],
        token_ids: Sequence[int],
        positions: Sequence[int],
        rows: Sequence[int],
    ) -> Tensor:
        """See `ModelRunner.forward`; computed in as many forwards as `rows.parts` makes of it."""
        logits = [self._part(kv, spans, token_ids, positions, rows, part) for part in parts(len(token_ids), self.sizes)]
        places = {row: place for place, row in enumerate(sorted(rows))}
        return torch.cat(logits)[[places[row] for row in rows]]

    def _part(
        self,
        kv: KVViews,
        spans: Sequence[Span],
        token_ids: Sequence[int],
        positions: Sequence[int],
        rows: Sequence[int],
        part: Part,
    ) -> Tensor:
        """Logits of the wanted rows of a part, in their order."""
        fill = [0] * (part.size - (part.stop - part.start))
        ids = [*token_ids[part.start : part.stop], *fill]
        places = [*positions[part.start : part.stop], *fill]
        step = make_step(kv, spans_of(spans, part, kv[0][0].shape[1]), self._backend)
        wanted = sorted(row - part.start for row in rows if part.start <= row < part.stop)
        repeated = [wanted[0]] * (padded(len(wanted), self.sizes) - len(wanted)) if wanted else []
        return self._run(step, ids, places, [*wanted, *repeated])[: len(wanted)]
