"""The faults that a user can act on."""


class StageError(Exception):
    """A fault that a user can act on; its message names the thing, the value and what was expected."""


class StoreError(StageError):
    """The MLflow store cannot be reached or used."""
