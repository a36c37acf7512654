"""Errors that are not plain ValueError or TypeError."""


class BackendError(RuntimeError):
    """No backend can serve a request, or the one that was named cannot.

    The message lists every backend that was asked and why it was refused.
    """
