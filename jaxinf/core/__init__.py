"""What every floor above shares: records of frozen dataclasses."""

from jaxinf.core.record import from_record, to_record

__all__ = ["from_record", "to_record"]
