"""Steps that cannot be computed: which of them end their jobs, and which end the worker.

Does not cover: want of memory as long as a smaller step may fit (`step_budget`)."""

from __future__ import annotations

import logging

from torch import AcceleratorError, OutOfMemoryError

from workers.protocol import JobError

log = logging.getLogger(__name__)

# So many failed steps in a row are no accident of their jobs: only a new process may help.
MAX_FAILED_STEPS = 3

NOT_FINITE = JobError(
    "MODEL_OUTPUT_NOT_FINITE",
    "the model's logits are not finite numbers; check its weights, or run it in bfloat16 or float32",
)


class StepFailures:
    """Counts failed steps in a row."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def succeeded(self) -> None:
        """A step was computed."""
        self._in_a_row = 0

    def failed(self, error: RuntimeError, sequences: int) -> JobError:
        """A step of so many sequences was not; what to tell them.

        Raises:
            RuntimeError: the error, where the device is broken or too many steps in a row failed.
        """
        log.error("step failed", exc_info=error, extra={"sequences": sequences})
        if not is_out_of_memory(error):
            self._in_a_row += 1
            if self._in_a_row >= MAX_FAILED_STEPS or _is_of_device(error):
                raise error
        what = str(error).partition("\n")[0]
        if is_out_of_memory(error):
            message = f"the worker's device has too little memory for this request alone ({what}); send it again later"
            return JobError("OUT_OF_MEMORY", f"{message}, or a shorter one; lower store.device_bytes if this repeats")
        return JobError("ENGINE_FAILURE", f"the model failed ({what}); send the request again, to another worker")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device had too little memory for a step; nothing is broken."""
    return isinstance(error, OutOfMemoryError) or "out of memory" in str(error)


def _is_of_device(error: RuntimeError) -> bool:
    """Whether the process can use its GPU no more: CUDA's errors stay until it ends."""
    return isinstance(error, AcceleratorError) or "CUDA error" in str(error)
