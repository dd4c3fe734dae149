"""The one exception for input that a user can put right."""


class InputError(ValueError):
    """Input that cannot be used: a file, a setting, an argument.

    The message is one sentence for the user: what is wrong, in which file and row, and the remedy. The command line
    prints it and exits with code 2.
    """
