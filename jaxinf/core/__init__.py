"""What every floor above shares: serialisable frozen dataclasses and numerics policy."""

from jaxinf.core.numerics import dot, precision_of
from jaxinf.core.record import from_record, to_record

__all__ = ["dot", "from_record", "precision_of", "to_record"]
