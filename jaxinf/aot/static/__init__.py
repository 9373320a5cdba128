"""The static model: cycles of a program from the schedule that the TPU compiler wrote for it.

The compiler dumps each operation's bundles, one a cycle; `emulator` runs their scalar half, so that trip counts,
taken branches and copies are exact, and `memory` adds the waits for HBM. Nothing here has run on a TPU.

Not modelled: what a copy costs besides its bytes, strided or short bursts, conflicts of banks and ports,
fetching instructions, throttling and launching; collectives take what `jaxinf.aot.wires` says. In an `Estimate`
an operation in a loop of XLA's (a scan) counts once; a `Timeline` follows the whole program. Where a program's
branches depend on data that was not given, a conditional part runs always and a loop once; `Estimate.suspect`
says when a time is too low to be believed.
"""

from jaxinf.aot.static.report import Estimate, Loop, Occupancy, Operation, Region, Span, row
from jaxinf.aot.static.timeline import Endless, Part, Timeline, timeline

__all__ = [
    "Endless",
    "Estimate",
    "Loop",
    "Occupancy",
    "Operation",
    "Part",
    "Region",
    "Span",
    "Timeline",
    "row",
    "timeline",
]
