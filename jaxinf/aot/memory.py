"""What a compiled program holds in each device's HBM."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `aliases` are outputs written into arguments: counted in both."""

    arguments: int
    outputs: int
    aliases: int
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        """What must fit: arguments, outputs that are not written into them, temporaries and code."""
        return self.arguments + self.outputs - self.aliases + self.temporaries + self.code


def of(executable: Any) -> Memory:
    """The compiler's own account of an executable."""
    stats = executable.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliases=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
