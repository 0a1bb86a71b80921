"""A plugin of pytest, `-p _at_once`: failures are printed as they happen.

A run that is stopped at its time limit would otherwise tell nothing about them.
"""

from __future__ import annotations

from typing import Any

LENGTH = 3000  # characters


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        print(f"\n{report.nodeid} ({report.when})\n{report.longreprtext[-LENGTH:]}", flush=True)
