"""The fixtures of tests/helpers/fixtures.py, and the order of the files."""

from fixtures import images, new_store, project, workspace  # noqa: F401

LONGEST = ("test_pipeline.py", "test_docs.py", "test_fixed_order.py", "test_search.py", "test_cluster.py")


def pytest_collection_modifyitems(items: list) -> None:
    """Put the longest files first, so that no core idles at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
