"""The fixtures of tests/helpers/fixtures.py, and the order of the files."""

from fixtures import images, new_store, project, workspace  # noqa: F401

# By minutes of one core, so that no core idles at the end.
LONGEST = [
    "test_pipeline.py", "test_docs.py", "test_search.py", "test_fixed_order.py", "test_cluster.py",
    "test_deploy.py", "test_page.py",
]  # fmt: skip


def pytest_collection_modifyitems(items: list) -> None:
    """Put the longest files first."""
    items.sort(key=lambda item: [*LONGEST, item.path.name].index(item.path.name))
