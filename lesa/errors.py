"""The exceptions that users see."""


class LesaError(ValueError):
    """Bad input, told in one sentence: the field, its value and the remedy."""


class RunError(LesaError):
    """A generation contradicts what was asked for; raised before its first step."""
