"""The one exception for input that a user can put right."""


class InputError(ValueError):
    """Input that cannot be used: a file, a setting, an argument.

    The message is one sentence for the user: what is wrong, in which file and row, and the remedy. The command line
    prints it and exits with code 2.
    """


def first_line(error: Exception) -> str:
    """What an error says, cut to a line that fits into a sentence; its kind if it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
