"""Words in a chat template that only an attack on its renderer needs.

Templates are copied and never rendered here, but every runtime renders them.
"""

import re
from collections.abc import Iterable

_SUSPICIOUS = re.compile(r"__\w{1,40}__|\\x5f\\x5f|\\u005f\\u005f|\|\s*attr\b")
_SHOWN = 5


def suspicious(templates: Iterable[str]) -> list[str]:
    """Names such as `__class__` in templates, and other ways to reach them: the first few."""
    found = {word for template in templates for word in _SUSPICIOUS.findall(template)}
    return sorted(found)[:_SHOWN]


def warning(templates: Iterable[str]) -> str:
    """A sentence about these names; empty without any."""
    words = suspicious(templates)
    if not words:
        return ""
    return (
        f"the chat template uses {', '.join(words)}, which no conversation needs: read it before "
        "you serve the file, because a runtime may run code with it"
    )
