"""Stock transformers models over our paged K/V: load, learn the K/V layout, refuse what would be wrong, forward.

Covers: everything that knows transformers (with `tiny`). Does not cover: which tokens to run (`scheduler`), how
attention reads the pool (`attention`), the folder's files (`model_folder`).

The model is transformers' own; only its attention function is ours, registered under a name that has no mask function,
so that no mask is built. A step's metadata travels to it as the keyword argument `paged`, which transformers hands down
untouched.

The probe gate is why an unsupported model is an error at start and not a wrong answer later: models that keep state
outside attention, bias the scores themselves or ignore the registered function run all the same, and lie.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from kvstore.layout import DTYPE_BYTES, KVLayout
from workers.attention.captured import CURRENT, INPUTS, attend, paged_attention
from workers.attention.choice import backend_for
from workers.attention.step import AttentionBackend, KVViews, Span, Step, make_step
from workers.model_folder import ModelFolder, ModelFolderError, open_model_folder
from workers.norms import simplify_norms
from workers.positions import changing_positions, hold_positions
from workers.tensor_parallel.shard import ModelGroup, NotDivisible, cut_model, kv_heads_of

ATTENTION, OPAQUE_ATTENTION = "warmkv_paged", "warmkv_opaque"
PAGED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
REMEDY = "choose a decoder-only model whose layers all keep plain K/V (Llama 3, Qwen 3, Mistral, Gemma 3, ...)"
# The model's own attention against ours, relative to the logits' size. Between transformers' own two implementations
# it is below 1e-5 in float32 and 2e-2 in half precision; a wrong mask or a lost bias gives 1e-1 and more.
SELF_CHECK_TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1, "float16": 5e-2}
_CHECK_TOKENS, _CHECK_CUT, _CHECK_BLOCK = 40, 24, 16

log = logging.getLogger(__name__)


class ModelNotSupported(ValueError):
    """The model would run and give wrong answers, or would not run. Says why and what to do."""


@dataclass(slots=True)
class _Probe:
    """What the attention function sees in the probe forward: (kv_heads, k_dim, v_dim) by layer."""

    shapes: dict[int, tuple[int, int, int]]


class ModelRunner:
    """A loaded model that computes packed steps over a paged pool.

    Attributes:
        layout: of its K/V, with the default block size. device, vocab_size: as they say.
        context_length: longest sequence that it was made for, tokens; None: it does not say.
        folder: where it came from. fingerprint: 32 bytes, see `ModelFolder.fingerprint`.
    """

    layout: KVLayout
    context_length: int | None
    _compiled: Any = None

    def __init__(
        self,
        model: Any,
        folder: ModelFolder,
        fingerprint: bytes,
        backend: AttentionBackend | None = None,
        *,
        whole: Tensor | None = None,
    ) -> None:
        """Take a model loaded with our attention, and probe it.

        `whole`: `own_logits` of the model before it was cut into shares; None: it is whole.

        Raises:
            ModelNotSupported: see `load`.
        """
        self._model, self._backend = model, backend or backend_for(torch.device(model.device))
        self.folder, self.fingerprint = folder, fingerprint
        self.device = torch.device(model.device)
        config = model.config.get_text_config()
        self.vocab_size = int(config.vocab_size)
        length = getattr(config, "max_position_embeddings", None)
        self.context_length = length if isinstance(length, int) and length > 0 else None
        self.layout = self._probe(config)
        self._check_itself(config, own_logits(model) if whole is None else whole)

    @classmethod
    def load(
        cls,
        model_dir: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        backend: AttentionBackend | None = None,
        ranks: ModelGroup | None = None,
        context_length: int | None = None,
    ) -> ModelRunner:
        """Load a Hugging Face model folder.

        Args:
            model_dir: the folder. device: a torch device. dtype: `auto` (the checkpoint's) or a key of DTYPE_BYTES.
            context_length: longest sequence that it will be given, tokens; None: that which it was made for.
            backend: what attends; None: what suits the device.
            ranks: others that load the same model; each keeps a share, and holds the whole in host memory till then.
            None: this one keeps all.

        Raises:
            ModelFolderError: files are missing or damaged, or do not fit one another.
            ModelNotSupported: the model cannot be served rightly over paged K/V.
            TritonMissing: the device is a GPU, and triton is not installed.
        """
        folder = open_model_folder(model_dir)
        _check_kind(folder, context_length)
        # The two read the same files; together they cost one pass over the disk.
        with ThreadPoolExecutor(1, thread_name_prefix="fingerprint") as pool:
            fingerprint = pool.submit(folder.fingerprint)
            model = _load_model(folder, dtype).eval().requires_grad_(False)
            hold_positions(model)
            whole = None if ranks is None else _cut(model, ranks)
            model = model.to(device)
            if cls.forward is ModelRunner.forward:  # the canonical check knows stock operations only
                simplify_norms(model)
        runner = cls(model, folder, fingerprint.result(), backend, whole=whole)
        if ranks is not None and runner.layout.kv_heads * ranks.size != kv_heads_of(model.config.get_text_config()):
            raise ModelNotSupported(f"{model.config.model_type}: its heads of K/V stay whole; set tensor_parallel to 1")
        log.info("model loaded", extra={"model_dir": str(folder.path), "layout": runner.layout.describe()})
        return runner

    @torch.inference_mode()
    def forward(
        self,
        kv: KVViews,
        spans: Sequence[Span],
        token_ids: Sequence[int],
        positions: Sequence[int],
        rows: Sequence[int],
    ) -> Tensor:
        """Run one packed step of T tokens; writes their K/V into the pool.

        Args:
            kv: the pool's views. spans: of the sequences, in the order of their rows.
            token_ids, positions: T each. rows: those whose logits are wanted.

        Returns:
            [len(rows), vocab] float32 logits on the model's device.
        """
        step = make_step(kv, spans, self._backend)
        return self._run(step, token_ids, positions, rows)

    @property
    def model(self) -> Any:
        """transformers' model."""
        return self._model

    @property
    def backend(self) -> AttentionBackend:
        """What attends."""
        return self._backend

    @torch.inference_mode()
    def forward_tensors(self, step: Step, token_ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """As `forward`, of a step whose numbers are tensors on the model's device, [T], [T] and [R] int64.

        Reads nothing else, so that it can be captured in a graph and replayed over the same memory.
        """
        return self._compute(step, token_ids, positions, rows)

    def compile(self, sizes: int, *, backend: str = "inductor") -> None:
        """From now on `forward_tensors` of a captured step runs compiled code; so many sizes of steps are expected.

        Attention is an operator that the compiler does not look into. Every size is compiled when it first comes, which
        takes seconds to minutes.
        """
        dynamo: Any = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, sizes + 8)
        dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 4 * (sizes + 8))
        self._model.set_attn_implementation(OPAQUE_ATTENTION)
        self._compiled = torch.compile(self._model, fullgraph=True, dynamic=False, backend=backend)

    def _run(self, paged: Step | _Probe, ids: Sequence[int], positions: Sequence[int], rows: Sequence[int]) -> Tensor:
        return self._compute(
            paged,
            torch.tensor(ids, device=self.device),
            torch.tensor(positions, device=self.device),
            torch.tensor(rows, dtype=torch.int64, device=self.device),  # there may be none
        )

    def _compute(self, paged: Step | _Probe, ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        model, more = self._model, {"paged": paged}
        if self._compiled is not None and isinstance(paged, Step):
            model, more = self._compiled if INPUTS in paged.plan else self._model, {}
            CURRENT[:] = [paged]
        out = model(input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=rows, **more)
        logits: Tensor = out.logits[0].float()
        return logits

    @torch.inference_mode()
    def _probe(self, config: Any) -> KVLayout:
        """A forward of two tokens that records what every layer would store."""
        probe = _Probe({})
        try:
            self._run(probe, [1, 2], [0, 1], [1])
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            raise ModelNotSupported(
                f"{config.model_type}: a probe forward with paged attention failed: {error}; {REMEDY}"
            ) from error
        layers = list(range(config.num_hidden_layers))
        if missing := [layer for layer in layers if layer not in probe.shapes]:
            _refuse(config.model_type, f"layers {missing} never called the attention function")
        shapes = set(probe.shapes.values())
        if len(shapes) != 1:
            _refuse(config.model_type, f"its layers store K/V of different shapes {sorted(shapes)}")
        dtype = str(self._model.dtype).removeprefix("torch.")
        return KVLayout(len(layers), *shapes.pop(), dtype=dtype)

    @torch.inference_mode()
    def _check_itself(self, config: Any, own: Tensor) -> None:
        """Compare a short prompt, cut in two over scattered blocks, with the model's own attention, and whole."""
        ours = self._paged_logits(_check_ids(self.vocab_size)).to(own.device)
        error = float((ours - own).norm() / own.norm().clamp_min(1e-12))
        if not error <= SELF_CHECK_TOLERANCE[self.layout.dtype]:
            _refuse(config.model_type, f"its logits over paged K/V differ from its own by {error:.1e} of their size")

    def _paged_logits(self, ids: list[int]) -> Tensor:
        shape, blocks = self.layout, [4, 0, 3]
        options = {"dtype": self._model.dtype, "device": self.device}
        kv = [
            (
                torch.zeros(5, _CHECK_BLOCK, shape.kv_heads, shape.k_dim, **options),
                torch.zeros(5, _CHECK_BLOCK, shape.kv_heads, shape.v_dim, **options),
            )
            for _ in range(shape.layers)
        ]
        for start, stop in ((0, _CHECK_CUT), (_CHECK_CUT, len(ids))):
            count = stop - start
            table = blocks[: -(-stop // _CHECK_BLOCK)]
            logits = self.forward(kv, [Span(0, count, stop, table)], ids[start:stop], range(start, stop), [count - 1])
        return logits[0]


@torch.inference_mode()
def own_logits(model: Any) -> Tensor:
    """[vocab] float32: what follows a short prompt by the model's own attention."""
    ids = _check_ids(int(model.config.get_text_config().vocab_size))
    model.set_attn_implementation("eager")
    try:
        logits: Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1]
    finally:
        model.set_attn_implementation(ATTENTION)
    return logits.float()


def _check_ids(vocab_size: int) -> list[int]:
    return [(7 * n + 3) % vocab_size for n in range(_CHECK_TOKENS)]


def _cut(model: Any, ranks: ModelGroup) -> Tensor:
    """Leave this rank's share of a model; its logits before."""
    whole = own_logits(model)
    try:
        cut_model(model, ranks)
    except NotDivisible as error:
        raise ModelNotSupported(f"{error}") from error
    return whole


def _check_kind(folder: ModelFolder, context_length: int | None) -> None:
    """Refuse by configuration and class, before any weight is read."""
    try:
        config = AutoConfig.from_pretrained(folder.path, local_files_only=True)
        kind = AutoModelForCausalLM._model_mapping[type(config)]
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ModelNotSupported(
            f"{folder.path}: transformers knows no causal language model for model_type "
            f"{folder.config.get('model_type')!r} ({_first_line(error)}); {REMEDY}"
        ) from error
    text = config.get_text_config()
    if not getattr(kind, "_supports_attention_backend", False):
        _refuse(text.model_type, "it does not route its attention through the registered attention function")
    if config.is_encoder_decoder:
        _refuse(text.model_type, "it is an encoder-decoder")
    if others := set(getattr(text, "layer_types", None) or ()) - PAGED_LAYER_TYPES:
        _refuse(text.model_type, f"layers of type {', '.join(sorted(others))} keep state that is not paged K/V")
    if getattr(text, "quantization_config", None) is not None:
        _refuse(text.model_type, "its weights are quantised, which is not supported yet")
    if why := changing_positions(text, context_length):
        raise ModelNotSupported(why)


def _load_model(folder: ModelFolder, dtype: str) -> Any:
    transformers_logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder.path,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=ATTENTION,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelFolderError(f"{folder.path} cannot be loaded ({_first_line(error)}); fetch it again") from error
    # transformers fills weights that are missing with random numbers and goes on.
    for key in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, report[key])):
            raise ModelFolderError(
                f"{folder.path}: the weights do not fit config.json ({key.replace('_', ' ')}: {', '.join(names[:3])}"
                f"{', ...' if len(names) > 3 else ''}); fetch the whole folder again"
            )
    if str(model.dtype).removeprefix("torch.") not in DTYPE_BYTES:
        raise ModelNotSupported(f"K/V of dtype {model.dtype} cannot be stored; set dtype to one of {list(DTYPE_BYTES)}")
    return model


def _paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    paged: Step | _Probe | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, T, k_dim], key and value [1, kv_heads, T, dim]."""
    if isinstance(paged, _Probe):
        _record(paged, module, key, value, attention_mask, others)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None
    if paged is None:
        raise ValueError(f"attention {ATTENTION!r} was called without the metadata of a step (paged=...)")
    out = attend(
        paged,
        module.layer_idx,
        query[0],
        key[0],
        value[0],
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None


def _opaque_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As `_paged_attention`, for a model that is compiled: the step is in `captured.CURRENT`."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx
    out = paged_attention(query[0], key[0], value[0], layer, scale, sliding_window, softcap, s_aux)
    return out[None], None


def _record(
    probe: _Probe, module: Any, key: Tensor, value: Tensor, mask: Tensor | None, others: dict[str, Any]
) -> None:
    layer = getattr(module, "layer_idx", None)
    if layer is None or layer in probe.shapes:
        raise ValueError(f"layer {layer} calls attention without a number of its own or more than once")
    if mask is not None or others.get("position_bias") is not None:
        raise ValueError("it biases or masks its attention scores itself")
    if not getattr(module, "is_causal", True):
        raise ValueError("its attention is not causal")
    probe.shapes[layer] = (key.shape[1], key.shape[-1], value.shape[-1])


def _refuse(model_type: str, why: str) -> NoReturn:
    raise ModelNotSupported(f"{model_type} is not supported: {why}; {REMEDY}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


AttentionInterface.register(ATTENTION, _paged_attention)
AttentionInterface.register(OPAQUE_ATTENTION, _opaque_attention)
