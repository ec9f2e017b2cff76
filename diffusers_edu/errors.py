"""The errors that a person can cause and mend. The one module that every other may import."""


class UsageError(ValueError):
    """A mistake in a flag, a path or the data. The message is one line that says what to do."""


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
