"""Errors for which commands have their own exit code."""


class UserError(ValueError):
    """A wrong key, value, file or combination: commands print the message and exit with 2.

    The message names the key or file, its value, what was expected and the remedy.
    """


class ConfigError(UserError):
    """An invalid option or size in the config, raised by the constructor or function that it was passed to.

    A wrong argument between two functions is a bug instead: a plain ValueError, printed with its traceback.
    """


class NonFiniteError(FloatingPointError):
    """A training with numbers that are no longer finite: commands print the message and exit with 3.

    The message names the file with the details.
    """
