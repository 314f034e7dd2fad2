"""The fixtures that the tests of the project have, too."""

from fixtures import new_store, project, workspace  # noqa: F401
