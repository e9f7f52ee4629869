"""Errors that a user can act on: one or two lines that say what is wrong, where, and what to do.

`cli.run` ends a program with one, without a traceback; any other exception is a bug.
"""


class ForgeError(Exception):
    """Something outside this program is wrong; the message says what, where, and what to do."""


class ConfigError(ForgeError):
    """`config.yaml` asks for something that cannot be."""


class CheckpointError(ForgeError):
    """A checkpoint is incomplete, malformed or contradicts itself."""


class GgufError(ForgeError):
    """A GGUF is malformed, or is not what it should be."""


class ToolchainError(ForgeError):
    """A program that we call is missing, too old, or failed."""


class DownloadError(ForgeError):
    """The Hub does not have something, does not give it, or gave something else."""


class VerificationError(ForgeError):
    """A finished file is not what was asked for, and must not be published."""

    table = ""
    """All verdicts on it."""


class RecordError(ForgeError):
    """A JSON file that a program of this pipeline wrote is malformed, or from another version."""


class UploadError(ForgeError):
    """The Hub does not take something."""
