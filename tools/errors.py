"""The exception of the set-up."""


class SetupError(Exception):
    """Set-up cannot continue. The message says what happened and what to do."""
