"""Errors that a user can mend, told in a line each; whatever else is raised is a bug's."""

from __future__ import annotations

import errno


class UserError(ValueError):
    """Something that its user can mend; the message holds one problem per line."""


class NotFoundError(UserError, FileNotFoundError):
    """A file or a folder that must be there, and is not."""


class ExistsError(UserError, FileExistsError):
    """A file or a folder that would be replaced, and must not be."""


# What a file system says of a user's files and folders, and what to do about it. Any other OSError
# (a closed descriptor, a lost connection) is a bug's or the machine's, and keeps its traceback.
_ROOM = "make room, then run the same command again"
_RIGHTS = "choose a place where you may do that, or ask for the right"
ADVICE = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "the file system, or `ulimit -f`, allows no larger file",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.EIO: "the disk fails",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "raise the system's limit of open files",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: None,
    errno.EEXIST: None,
    errno.ENOTDIR: None,
    errno.EISDIR: None,
    errno.ENOTEMPTY: None,
    errno.ELOOP: None,
}


def words(error: BaseException) -> str | None:
    """What to tell a user, one problem per line; None for what no user can mend."""
    if isinstance(error, UserError):
        return str(error)
    if not isinstance(error, OSError) or error.errno not in ADVICE:
        return None
    name = error.filename2 or error.filename  # of two, that which is written
    where = f"{name}: " if name else ""
    advice = ADVICE[error.errno]
    return f"{where}{(error.strerror or '').lower()}{f'; {advice}' if advice else ''}"
