"""JAX's persistent compilation cache, on by default."""

from __future__ import annotations

import os
from pathlib import Path

import jax

SWITCH = "JAXINF_COMPILATION_CACHE"
"""Environment variable: 0 turns the cache off, a path puts it there."""


def folder() -> Path | None:
    """Where compiled programs are kept between processes; None: nowhere."""
    value = os.environ.get(SWITCH, "")
    if value.lower() in ("0", "off", "false", "no"):
        return None
    if value and value.lower() not in ("1", "on", "true", "yes"):
        return Path(value).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "jaxinf" / "compiled"


def enable() -> None:
    """Turns the cache on, unless switched off, set up by the program already, or its folder cannot be made."""
    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    wanted = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    if chosen or not wanted:
        return
    where = folder()
    if where is None:
        return
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", str(where))
    # A small model's programs take less than JAX's default of a second each, but several seconds together.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # JAX looks for the folder at its first compilation alone, and that may be over.
    compilation_cache.reset_cache()
