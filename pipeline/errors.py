"""Errors for people: what failed, why, and what to do next. The CLI prints them without a stack trace."""

from __future__ import annotations

EXIT_SUCCESS = 0
EXIT_RUN_FAILED = 1  # a stage failed after its retries
EXIT_USER_ERROR = 2  # refused before anything started: bad workflow, parameter, store, address
EXIT_RUN_ELSEWHERE = 3  # another driver holds the run
EXIT_READER_LEFT = 141  # the reader of the output left before the command knew its result; as in any pipe of a shell
EXIT_CANCELLED = 130  # Ctrl-C or `polytrope cancel`; the run can be resumed


class UserError(Exception):
    """A mistake that the user can mend. Never retried.

    Args:
        message: what is wrong, naming file, field and value.
        hint: what to do, ideally the command to run next.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str]]:
        return type(self), (self.message, self.hint)


class RunElsewhereError(UserError):
    """Another driver holds the run (exit code 3)."""
