"""The one exception that means "the user can fix this"."""


class SaccadeError(ValueError):
    """Bad input: the message is one line that names the field, its value and the fix.

    The command line prints the message without a traceback and exits with status 2.
    """
