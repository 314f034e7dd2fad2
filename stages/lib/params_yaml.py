"""Reading params.yaml as DVC reads it."""

import re
from pathlib import Path

import yaml

from lib.errors import StageError

PARAMS_PATH = Path("params.yaml")


class ParamsLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, and reads numbers as DVC does or not at all.

    PyYAML follows YAML 1.1, DVC 1.2: 1e-3 is a number to DVC alone, and 010 is 8 or 10, 1:30 90 or text.
    """

    def construct_mapping(self, node, deep=False):
        """A mapping; raises StageError for a key that stands twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise StageError(f"{PARAMS_PATH}: key {key!r} stands twice, expected once")
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node):
        """An integer; raises StageError where DVC may read another."""
        return super().construct_yaml_int(_plain(node))

    def construct_yaml_float(self, node):
        """A float; raises StageError where DVC may read another."""
        return super().construct_yaml_float(_plain(node))


def _plain(node: yaml.ScalarNode) -> yaml.ScalarNode:
    if re.match(r"[-+]?0[0-9xb]|.*[:_]", node.value):
        raise StageError(
            f"{PARAMS_PATH}: {node.value} is not a plain decimal number, expected one like 10 or 0.5"
        )
    return node


ParamsLoader.add_constructor("tag:yaml.org,2002:int", ParamsLoader.construct_yaml_int)
ParamsLoader.add_constructor("tag:yaml.org,2002:float", ParamsLoader.construct_yaml_float)
ParamsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
