"""What the checks of all notebooks share: calling a student's function, whatever it does."""

from __future__ import annotations

UNSOLVED = "Not solved yet: fill in the cell above and run it again."
NO_RETURN = "Your function returned None: is a `return` missing?"


def call(function, *arguments):
    """(result, None), or (None, message) where there is nothing to look at."""
    if function is None or function is ...:
        return None, UNSOLVED
    if not callable(function):
        return (
            None,
            f"Give the check your function itself, without calling it; it got a {type(function).__name__}.",
        )
    try:
        value = function(*arguments)
    except NotImplementedError:
        return None, UNSOLVED
    except Exception as error:  # noqa: BLE001   whatever a student's code raises is told
        return None, f"Your function raised {type(error).__name__}: {error}"
    if value is None:
        return None, NO_RETURN
    return (None, UNSOLVED) if value is ... else (value, None)


def number(function, *arguments):
    """The same for a function that should return one number."""
    value, message = call(function, *arguments)
    if message:
        return None, message
    try:
        return float(value), None
    except (TypeError, ValueError):
        return (
            None,
            f"Your function returned a {type(value).__name__}; it should return one number.",
        )
