"""What can be wrong with an image, and how a copy ends before its end."""

from __future__ import annotations

from forkpointd.model import ForkpointError, Reason


class ImageError(ForkpointError):
    """Files of a snapshot or of a window are not what they must be: cut, altered, lying about
    their sizes, of an unknown format, in the way. Nothing was guessed and nothing changed."""

    def __init__(self, message: str) -> None:
        super().__init__(Reason.IMAGE_DAMAGED, message)


class NoReflink(Exception):
    """The file system can't make two files share their blocks, and a copy was not allowed."""


class Stopped(Exception):
    """A copy was told to stop. What it had written so far is no image."""


class ArchiveError(ForkpointError):
    """An archive is cut, altered, or no archive of ours. Nothing of it is kept."""

    def __init__(self, message: str) -> None:
        super().__init__(
            Reason.ARCHIVE_INVALID,
            f"{message}. Nothing of it was kept: copy the archive, or export the snapshot, anew",
        )
