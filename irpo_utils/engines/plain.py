"""The engine with nothing added to the core: the one to read, and the one the others must equal."""

from irpo_utils.engines import Engine

__all__ = ["Engine"]
