"""Fixtures shared with the project's tests."""

from fixtures import new_store, project, workspace  # noqa: F401
