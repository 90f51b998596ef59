"""The exceptions that a caller is meant to catch; their messages are sentences for the person at the keyboard."""

from __future__ import annotations


class MoshivisError(Exception):
    """Anything that went wrong for a reason outside the code. The command line prints it and exits with status 2."""


class InputError(MoshivisError):
    """A picture, a recording, a text or an argument that cannot be used."""


class CheckpointError(MoshivisError):
    """A checkpoint that is missing, damaged, or not of the model that it should be."""


class ShardError(InputError):
    """A file of a packed data set that is missing, damaged or not what its manifest says."""
