"""The one exception that means "the user can fix this"."""


class SaccadeError(ValueError):
    """Bad input: the message is one line that names the field, its value and the fix.

    The command line prints the message without a traceback and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        # A data-loader worker hands its errors on with the whole traceback as the message.
        if message.startswith("Caught SaccadeError in DataLoader worker"):
            message = message.rpartition("SaccadeError: ")[2].strip()
        super().__init__(message)
