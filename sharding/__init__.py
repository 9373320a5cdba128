"""Device meshes and placement."""

from sharding.layouts import place, row_major

__all__ = ["place", "row_major"]
