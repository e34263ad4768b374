"""Is every operation of a model one that treats each row by itself? Watches a forward and refuses what is not known to.

The check by numbers (`workers.canonical.check`) sees only what random tokens show. A mixture of experts, for example,
multiplies as many rows by an expert as chose it, and that changes with the companions in the step; so an operation that
is not on the list is an error at start, and not a difference that somebody finds later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Products, whose kernel hangs on the number of rows: fixed by `rows`, tried by `products`. All others compute each
# element by itself, or each row in one pass over its last dimension, or only move data.
PRODUCTS = frozenset({"linear"})
BY_ROW = frozenset({"embedding", "layer_norm", "rms_norm", "mean", "softmax", "_softmax"})
BY_ELEMENT = frozenset(
    {
        "abs",
        "add",
        "clamp",
        "cos",
        "div",
        "exp",
        "gelu",
        "mul",
        "neg",
        "pow",
        "relu",
        "rsqrt",
        "sigmoid",
        "silu",
        "sin",
        "sqrt",
        "sub",
        "tanh",
        "where",
    }
)
MOVES = frozenset(
    {
        "_to_copy",
        "_unsafe_view",
        "alias",
        "arange",
        "cat",
        "chunk",
        "clone",
        "contiguous",
        "copy_",
        "detach",
        "detach_",
        "dropout",
        "empty",
        "empty_like",
        "expand",
        "flatten",
        "full",
        "full_like",
        "index",
        "index_select",
        "lift_fresh",
        "narrow",
        "new_zeros",
        "ones",
        "ones_like",
        "permute",
        "repeat",
        "repeat_interleave",
        "reshape",
        "scalar_tensor",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "stack",
        "t",
        "to",
        "transpose",
        "type_as",
        "unbind",
        "unflatten",
        "unsqueeze",
        "view",
        "zeros",
        "zeros_like",
    }
)
KNOWN = PRODUCTS | BY_ROW | BY_ELEMENT | MOVES


class Audit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the operations of what runs under it that may mix rows.

    Attributes:
        doubtful: their names.
    """

    def __init__(self) -> None:
        """Start with none."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.doubtful: set[str] = set()

    def __torch_dispatch__(
        self,
        operation: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Note an operation and carry it out."""
        name = str(operation).split(".")[1]
        if name not in KNOWN and not _outer_product(name, args):
            self.doubtful.add(name)
        return operation(*args, **(kwargs or {}))


def _outer_product(name: str, args: tuple[Any, ...]) -> bool:
    """Whether it is a product that adds nothing up, as rotary embeddings make of frequencies and positions."""
    return name in ("matmul", "bmm") and isinstance(args[0], Tensor) and args[0].shape[-1] == 1
