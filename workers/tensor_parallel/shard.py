"""Cut a stock transformers model into the share of one rank, by the plan that its own class carries.

`model.tp_plan` names for each linear layer how it is cut (Megatron-LM, Shoeybi et al. 2019): `colwise` keeps a run of
output features, `rowwise` a run of input features and adds the outputs up over the ranks. Attention between them runs
over this rank's heads alone. transformers' own executor of these plans is not used: it wants `accelerate`, chooses the
device itself and unwraps distributed tensors in every call, which no CUDA graph can hold.

Only what can be checked is cut: every other style is refused, and `models` compares the cut model's logits with those
of the whole one before anything is served.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# These stay whole: norms over one head, whose plan is about gradients, and embeddings, which a tied head shares.
WHOLE = frozenset({"replicated_with_grad_allreduce", "embedding_rowwise"})
HEAD = "lm_head"
REMEDY = "set tensor_parallel to 1, or to a number that divides the model's heads"


class NotDivisible(ValueError):
    """The model cannot be cut into so many parts. Says why and what to do."""


class ModelGroup(Protocol):
    """What a cut model asks of the ranks; `group.RankGroup` says what it means."""

    rank: int
    size: int

    def add_up(self, part: Tensor) -> Tensor:
        """The sum over the ranks."""
        ...

    def side_by_side(self, part: Tensor) -> Tensor:
        """All parts, joined at the last dimension."""
        ...


def cut_model(model: Any, group: ModelGroup) -> None:
    """Keep this rank's share of every layer that the plan names, and free the rest.

    Raises:
        NotDivisible: there is no plan, it wants something that is not supported, or sizes do not divide.
    """
    config = model.config.get_text_config()
    check_heads(config, group.size)
    plan = dict(getattr(model, "tp_plan", None) or {})
    if not plan:
        raise NotDivisible(f"{config.model_type} says of no layer how it is cut among GPUs; set tensor_parallel to 1")
    for name, module, style in list(_planned(model, plan)):
        _cut(model, name, module, style, group)


def check_heads(config: Any, size: int) -> None:
    """Every rank needs as many heads as the others.

    Raises:
        NotDivisible: it cannot.
    """
    heads = int(config.num_attention_heads)
    kv_heads = kv_heads_of(config)
    if heads % size or kv_heads % size:
        raise NotDivisible(
            f"{config.model_type} has {heads} heads and {kv_heads} of K/V, which {size} ranks cannot share out evenly; "
            f"{REMEDY}"
        )


def kv_heads_of(config: Any) -> int:
    """Heads of K/V of the whole model."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _planned(model: nn.Module, plan: dict[str, str]) -> Iterator[tuple[str, nn.Module, str]]:
    for name, module in model.named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style is not None:
            yield name, module, style


def _cut(model: Any, name: str, module: nn.Module, style: str, group: ModelGroup) -> None:
    if style in WHOLE:
        return
    if style == "colwise_gather_output" and name == HEAD:
        _cut_head(model, module, group)
        return
    if style not in ("colwise", "rowwise") or not isinstance(module, nn.Linear):
        raise NotDivisible(
            f"{name} is a {type(module).__name__} to be cut as {style!r}, which is not supported; "
            "set tensor_parallel to 1, or choose a dense model such as Llama, Qwen3, Mistral or Gemma"
        )
    if style == "colwise":
        _keep_outputs(name, module, group)
    else:
        _keep_inputs(name, module, group)


def _cut_head(model: Any, module: nn.Module, group: ModelGroup) -> None:
    """Logits are joined again; a head that shares its weight with the embedding, or does not divide, stays whole."""
    is_tied = module.weight is model.get_input_embeddings().weight
    if not isinstance(module, nn.Linear) or is_tied or module.out_features % group.size:
        return
    _keep_outputs(HEAD, module, group)
    module.register_forward_hook(lambda _module, _args, out: group.side_by_side(out))


def _keep_outputs(name: str, module: nn.Linear, group: ModelGroup) -> None:
    module.weight = _own(name, module.weight, 0, group)
    if module.bias is not None:
        module.bias = _own(name, module.bias, 0, group)
    module.out_features = module.weight.shape[0]


def _keep_inputs(name: str, module: nn.Linear, group: ModelGroup) -> None:
    module.weight = _own(name, module.weight, 1, group)
    module.in_features = module.weight.shape[1]
    if module.bias is None:
        module.register_forward_hook(lambda _module, _args, out: group.add_up(out))
        return
    bias = module.bias
    module.register_parameter("bias", None)  # added once, not by every rank
    module.register_parameter("whole_bias", bias)
    module.register_forward_hook(lambda own, _args, out: group.add_up(out) + own.whole_bias)


def _own(name: str, whole: Tensor, dim: int, group: ModelGroup) -> nn.Parameter:
    total = whole.shape[dim]
    if total % group.size:
        raise NotDivisible(f"{name} has {total} features, which {group.size} ranks cannot share out evenly; {REMEDY}")
    count = total // group.size
    with torch.no_grad():
        share = whole.narrow(dim, group.rank * count, count).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(share, requires_grad=False)
