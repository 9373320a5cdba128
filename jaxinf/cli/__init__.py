"""The command `jaxinf`. Importing this loads neither jax nor flax: a verb's module does when it is called."""

from jaxinf.cli.command import main

__all__ = ["main"]
