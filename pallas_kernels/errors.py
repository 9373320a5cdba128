"""Errors that users meet. Each message is one sentence: what was given, what is allowed, what to do.

The command line prints the message of a `JaxinfError` and exits; anything else is a defect of ours.
"""


class JaxinfError(Exception):
    """Base of every error that this project raises on purpose."""


class InputError(JaxinfError, ValueError):
    """An argument is out of range, of the wrong shape or of the wrong type."""


class UnsupportedError(JaxinfError, NotImplementedError):
    """The request is well formed but this build cannot serve it; the message lists every reason."""


class CheckpointError(JaxinfError, ValueError):
    """A checkpoint is missing, corrupt, or does not match the model."""


class ProcessError(JaxinfError, RuntimeError):
    """Of a run over several processes, one is missing, lost, or not of the same run."""
