"""Errors that a command answers with an exit code of its own."""


class UserError(ValueError):
    """A wrong key, value, file or combination; the text names it, what was expected and the remedy (commands print it and exit with 2)."""


class ConfigError(UserError):
    """An option or size that a person chose and the code cannot use; raised by the constructor or function that it was passed to.

    A mistake in what one function passes to another is a plain ValueError, a bug, and keeps its traceback.
    """


class NonFiniteError(FloatingPointError):
    """A training whose numbers are no longer finite; the text says where its evidence lies (commands print it and exit with 3)."""
