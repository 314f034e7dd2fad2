"""The fixtures of tests/helpers/fixtures.py."""

from fixtures import images, new_store, project, workspace  # noqa: F401
