"""The exceptions that the command line tells in one line, without a traceback."""


class UserError(ValueError):
    """The input is wrong. The message says in one line what is wrong and what to do about it.

    The command line prints it on stderr and exits 2; the HTTP service answers 4xx with it.
    Any other exception is a defect of this library and exits 1.
    """


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became NaN or infinite in training; the last checkpoint is good."""
