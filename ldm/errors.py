"""Mistakes a person made and can mend: said in one line, without a traceback."""


class UserError(ValueError):
    """A wrong key, value, file or combination; the text names it, what was expected and the remedy (commands print it and exit with 2)."""
