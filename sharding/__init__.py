"""Device meshes, placement, and collectives over a mesh's axes."""

from sharding.collectives import AXES
from sharding.layouts import place, row_major

__all__ = ["AXES", "place", "row_major"]
