"""What the checks of all notebooks share: calling a student's function, whatever it does."""

from __future__ import annotations

import dis

UNSOLVED = "Not solved yet: fill in the cell above and run it again."
PLACEHOLDER = "Your code ran, but the last line still returns `...`: return your result there."
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
    return (None, unsolved(function)) if value is ... else (value, None)


def unsolved(function) -> str:
    """What to say if the function returns `...`: is that all it does?"""
    code = getattr(function, "__code__", None)
    steps = {step.opname for step in dis.get_instructions(code)} if code else set()
    stub = {"RESUME", "LOAD_CONST", "RETURN_CONST", "RETURN_VALUE"}
    return UNSOLVED if steps <= stub else PLACEHOLDER


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
