"""Errors that are not plain ValueError or TypeError."""


class BackendError(RuntimeError):
    """No backend can serve a request, or the one that was named cannot.

    The message lists every backend that was asked and why it was refused.
    """


class StateError(ValueError):
    """A state that cannot be taken over: it is damaged, incomplete, or means something else.

    The message says what is wrong and where; nothing has been changed.
    """
