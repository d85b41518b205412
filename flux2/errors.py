"""The one exception that means: the user can mend this."""

from __future__ import annotations

from collections.abc import Mapping


class InputError(Exception):
    """Bad configuration or input. Its message is one line: what is wrong, and what to do.

    run.py prints the line and exits with code 2. Raise it before any weight is loaded.
    """


class BatchError(InputError):
    """The batches that data.collate makes lack what the method needs. A rehearsal (`flux2.plan`)
    tells it before any weight is loaded."""


def check_positive(values: Mapping[str, float]) -> None:
    """values: names within method → numbers. Raises InputError for one that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise InputError(f"method.{name} is {value}: it must be positive")
