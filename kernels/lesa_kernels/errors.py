"""What this package and `lesa` raise: lesa imports the kernels, and they nothing of it."""


class LesaError(ValueError):
    """Bad input, told in one sentence: the field, its value and the remedy."""
