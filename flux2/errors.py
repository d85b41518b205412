"""The one exception that means: the user can mend this."""

from __future__ import annotations


class InputError(Exception):
    """Bad configuration or input. Its message is one line: what is wrong, and what to do.

    run.py prints the line and exits with code 2. Raise it before any weight is loaded.
    """
