"""What torch says where a collective breaks because another process is gone."""

from __future__ import annotations

import re

from torch import distributed

from qvgen.errors import one_line


def is_of_network(error: RuntimeError) -> bool:
    """Whether an error of torch's says that another process is gone: gloo has no type for that."""
    return isinstance(error, distributed.DistError) or "gloo/transport" in str(error)


def gone_words(error: RuntimeError) -> str:
    """What gloo says, without the line of its source before it and the advice behind it."""
    said = re.sub(r"^\[.*?\.cc:\d+\] ", "", one_line(error)).partition(". ")[0]
    return f"another process is gone ({said})"
