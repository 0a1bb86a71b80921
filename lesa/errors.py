"""The one exception that users see."""


class LesaError(ValueError):
    """Bad input, told in one sentence: the field, its value and the remedy."""
