"""Errors that a command answers with an exit code of its own."""


class UserError(ValueError):
    """A wrong key, value, file or combination; the text names it, what was expected and the remedy (commands print it and exit with 2)."""


class NonFiniteError(FloatingPointError):
    """A training whose numbers are no longer finite; the text says where its evidence lies (commands print it and exit with 3)."""
