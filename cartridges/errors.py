"""The one exception a user's mistake may raise."""


class UserError(ValueError):
    """The input is wrong. The message is one line: what is wrong, and what to do about it.

    The command line prints it on stderr and exits 2; the HTTP service answers 4xx with it.
    Anything else that escapes is our own defect and exits 1.
    """
