"""Faster ways to do what the core does plainly; one module with a class `Engine` each."""
