"""The one exception that means: what the user gave cannot be used.

The command line prints its message as it is and exits with status 2, so the message is one sentence:
the thing, its value, what was wanted, and the mend where there is one.
"""


class InputError(ValueError):
    """A config, file, folder or data set that cannot be used as it is."""
