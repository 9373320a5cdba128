"""Writing new tokens into a cache, in place."""

from pallas_kernels.cache_append.api import cache_append

__all__ = ["cache_append"]
