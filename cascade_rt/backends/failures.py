"""What a runtime's exception says, in one line, and what to do where memory ran out."""

from __future__ import annotations

import re

from ..errors import plain, shortened

MORE_MEMORY = "use --low-memory, or a smaller size or batch"
_OUT_OF_MEMORY = re.compile(
    r"bad[_ ]?alloc|out[ _-]of[ _-]memory|memoryallocation|memory allocation|not enough memory|"
    r"(fail\w*|can(no|')t|could not|unable) to allocate|can(no|')t allocate|could not allocate",
    re.IGNORECASE,
)


def reason_of(error: BaseException, last_line: bool = False) -> str:
    """One line of a runtime's exception.

    Args:
        error: of any type: runtimes raise types of their own, of which some are not exported.
        last_line: take the last line of its message instead of the first.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = shortened(plain(lines[-1 if last_line else 0]), 400)
    if isinstance(error, MemoryError) or ran_out_of_memory(str(error)):
        return f"there is not enough memory ({text}); {MORE_MEMORY}"
    return text


def ran_out_of_memory(text: str) -> bool:
    """Whether a message of a runtime means that memory ran out."""
    return bool(_OUT_OF_MEMORY.search(text))
