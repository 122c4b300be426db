"""The exceptions that the command line tells in one line, without a traceback."""


class UserError(ValueError):
    """The input is wrong. The message says in one line what is wrong and what to do about it.

    The command line prints it on stderr and exits 2; the HTTP service answers 4xx with it.
    Other exceptions exit 1; those that are no defect (`NonFiniteLoss`, a disk that cannot be written) in one line too.
    """


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became NaN or infinite in training; the last checkpoint is good."""
