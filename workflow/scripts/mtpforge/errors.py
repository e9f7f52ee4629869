"""Errors that a user can act on: one or two lines that say what is wrong, where, and what to do.

`cli.run` ends a program with the message, without a traceback. Any other exception is a bug.
"""


def printable(text: str) -> str:
    """Text with control characters, which could command a terminal, written as escapes."""
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character.isprintable() or character in "\n\t":
        return character
    return character.encode("unicode_escape").decode()


class ForgeError(Exception):
    """Something outside the program is wrong; the message says what, where, and what to do."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(ForgeError):
    """A setting or a command line asks for something impossible."""


class CheckpointError(ForgeError):
    """A checkpoint is incomplete, malformed or contradictory."""


class GgufError(ForgeError):
    """A GGUF is malformed, or not the one that is needed."""


class ToolchainError(ForgeError):
    """A program that the pipeline runs is missing, too old, or failed."""


class DownloadError(ForgeError):
    """The Hub lacks a file, refuses it, or sent a different one."""


class VerificationError(ForgeError):
    """A finished file is not what was requested, and must not be published."""

    table = ""
    """The verdicts of all checks, as a table."""


class DamagedError(ForgeError):
    """A file is not as it was when its digest was recorded: a disk or memory has changed it."""


class RecordError(ForgeError):
    """A JSON file that a program of this pipeline wrote is malformed, or from another version."""


class UploadError(ForgeError):
    """The Hub or an object storage refused an upload."""


class StorageError(ForgeError, OSError):
    """A disk is full, over quota, read-only or failing, or refuses access."""
