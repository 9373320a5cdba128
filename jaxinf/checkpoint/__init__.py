"""Checkpoints: Hugging Face folders in, the project's own form (safetensors or orbax) in and out."""

from jaxinf.checkpoint.converting import convert
from jaxinf.checkpoint.loading import Loaded, load, read_spec
from jaxinf.checkpoint.orbax import save_orbax
from jaxinf.checkpoint.own import save

__all__ = ["Loaded", "convert", "load", "read_spec", "save", "save_orbax"]
