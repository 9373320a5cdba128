"""Small programs in the form of the compiler's dumps."""

from jaxinf.aot.static.bundles import Program
from jaxinf.aot.static.machine import Machine, machine
from pallas_kernels import chips

V5E: Machine = machine(chips.find("v5e"))


def program(*bundles: str, on: Machine = V5E) -> Program:
    """Each argument is a bundle, its instructions separated by " ;; "."""
    lines = [f"  {hex(i) if i else '   0'}   :  {{ {b} }}" for i, b in enumerate(bundles)]
    return Program.parse("test", "\n".join(["= control target key end", "", *lines]), on)


DELAY = [""] * 4  # a v5e runs four bundles after a branch
