"""What a shell completes behind an option: names that begin with what is typed so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def pipelines(incomplete: str) -> list[str]:
    """The embedded pipelines that begin so."""
    from lesa import testbed

    names = ["testbed", *testbed.PIPELINES, *(f"testbed:{name}" for name in testbed.PIPELINES)]
    return _beginning(incomplete, names)


def schedulers(incomplete: str) -> list[str]:
    """The samplers that begin so."""
    from lesa.cli.schedulers import CLASSES

    return _beginning(incomplete, CLASSES)


def forecasters(incomplete: str) -> list[str]:
    """The training-free forecasters that begin so."""
    from lesa.forecasters.published import METHODS

    return _beginning(incomplete, METHODS)


def methods(incomplete: str) -> list[str]:
    """A list of methods, whose last name begins so."""
    from lesa.evaluation.methods import NAMES

    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in _beginning(last, ["all", *NAMES])]


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def among(names: Iterable[str]) -> Callable[[str], list[str]]:
    """A completion of some given names."""

    def complete(incomplete: str) -> list[str]:
        """Those that begin so."""
        return _beginning(incomplete, names)

    return complete
