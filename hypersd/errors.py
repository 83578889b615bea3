"""The one exception that a user is meant to read."""

from __future__ import annotations


class HypersdError(Exception):
    """Bad input or a failed external condition. The message is one line: what, where, what to do.

    `exit_code` is what the command line returns: 2 for a wrong request (recipe, option), 1 for anything else.
    """

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
