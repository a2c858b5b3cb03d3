"""How often XLA compiles."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax import monitoring

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """The XLA compilations inside the block; no persistent cache hides one."""
    events: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == COMPILED:
            events.append(event)

    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        monitoring.unregister_event_duration_listener(listen)
        jax.config.update("jax_enable_compilation_cache", enabled)
