"""What an exception that ended a job means, in words that reach the user."""

import re

# Torch has a class of its own for the memory of a GPU, and none for that of a CPU.
_SAYS_SO = re.compile(
    r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED", re.IGNORECASE
)


class InputsGoneError(ValueError):
    """Links to inputs, which lay on this computer for several jobs, lead nowhere."""


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the memory, of the CPU or of the GPU, did not do."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_SAYS_SO.search(str(error)))


def reason_of(error: Exception) -> str:
    """Return the reason of a failure as users shall read it."""
    # Our own messages are those of a ValueError; anything else needs its name to make sense.
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
