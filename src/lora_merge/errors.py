"""Errors a user can act on: `message` says what and where, `remedy` what to do; `str()` both."""

import errno
from collections.abc import Sequence

_FULL = "free space, or choose another place"
# What to do where the system refuses, whatever was asked of it.
_OF_THE_SYSTEM = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit of open files",
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or choose another file system",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EROFS: "choose another place: this one can only be read",
}


def remedy_of(cause: BaseException | None, otherwise: str) -> str:
    """What to do about an error of the system, whoever met it; else what is said."""
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _OF_THE_SYSTEM:
            return _OF_THE_SYSTEM[cause.errno]
        cause = cause.__cause__
    return otherwise


class LoraMergeError(Exception):
    """Base of all errors that are the input's fault, not a bug.

    Args:
        message: What is wrong and where (adapter, module, shapes).
        remedy: What the user can do about it.

    Examples:
        >>> print(LoraMergeError("math: no such file or directory", "check the path"))
        math: no such file or directory
          try: check the path
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self._remedy = remedy

    @property
    def remedy(self) -> str:
        """What the user can do about it; of an error that the system caused, about that."""
        return remedy_of(self.__cause__, self._remedy)

    def __str__(self) -> str:
        return f"{self.message}\n  try: {self.remedy}" if self.remedy else self.message


class SourceError(LoraMergeError):
    """A reference names nothing that can be opened."""


class AdapterError(LoraMergeError):
    """A file is there but is not an adapter this library can take apart."""


class AlignmentError(LoraMergeError):
    """Adapters cannot be stacked together, or do not fit a model; lists every mismatch at once."""

    def __init__(
        self,
        mismatches: Sequence[str],
        remedy: str = "",
        *,
        what: str = "the adapters do not fit together",
    ) -> None:
        self.mismatches = tuple(mismatches)
        super().__init__("\n  ".join((f"{what}:", *mismatches)), remedy)


class MethodError(LoraMergeError):
    """A method was asked for something it cannot do."""


class OutputError(LoraMergeError):
    """The result cannot be written where it was asked for."""


class LoraMergeWarning(UserWarning):
    """Something that works, but not as it might be meant: a gate untrained, a kernel replaced.

    Examples:
        >>> import warnings
        >>> warnings.simplefilter("error", LoraMergeWarning)
    """


class NotFiniteError(OutputError):
    """A result holds NaN or infinity, and no file may."""


class ArgumentError(LoraMergeError, TypeError):
    """A function was called with an argument that it does not have, or that others exclude."""
