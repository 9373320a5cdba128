"""Which mesh axes split which dimension: the one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

from pallas_kernels.errors import InputError

GROUPS = "groups:"
"""Before the name of an axis: a dimension with an entry for several of its entries each."""
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "expert"),
    "layers": ("pipeline",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "expert": ("expert",),
    "expert_ffn": ("tensor",),
    "embed": (),
}


def spec(logical: Sequence[str | None], rules: Mapping[str, tuple[str, ...]] = RULES) -> PartitionSpec:
    """How an array with these logical axes is split; `groups:name` counts groups of what `name` splits.

    Raises:
      InputError: an unknown logical axis, or two dimensions that the same mesh axis would split.
    """
    entries, used = [], {}
    for name in logical:
        name = None if name is None else name.removeprefix(GROUPS)
        if name is not None and name not in rules:
            raise InputError(f"no rule for the logical axis {name!r}; known are {', '.join(rules)}")
        axes = () if name is None else rules[name]
        for axis in axes:
            if axis in used:
                raise InputError(f"{used[axis]} and {name} of one array would both be split over {axis}")
            used[axis] = name
        entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*entries)
