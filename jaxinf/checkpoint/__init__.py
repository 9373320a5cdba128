"""Checkpoints: Hugging Face folders in, the project's own form in and out."""

from jaxinf.checkpoint.loading import Loaded, load, read_spec
from jaxinf.checkpoint.own import save

__all__ = ["Loaded", "load", "read_spec", "save"]
