"""The one exception of the set-up."""


class SetupError(Exception):
    """Set-up cannot go on. The message says what happened and what to do about it."""
