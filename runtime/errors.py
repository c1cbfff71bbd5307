"""The one exception that a user is meant to read."""


class DualmatchError(ValueError):
    """Input that cannot be used: what was asked, what was found, what to do, in one sentence.

    The command line prints the message without a traceback and exits with 1.
    """
