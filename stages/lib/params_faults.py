"""What is wrong with params.yaml, in one line: the path, the value and what is allowed."""

import difflib
import reprlib

from pydantic import BaseModel, ValidationError

SHOWN = reprlib.Repr()  # a value in a line: of nested lists and tables, only the outside
SHOWN.maxstring = SHOWN.maxother = 80  # characters


def explain(error: ValidationError, params: type[BaseModel]) -> str:
    """Say what the first fault of `error` is, in terms of the model `params` of the whole file."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"] if part not in ("int", "none"))
    if fault["type"] in ("extra_forbidden", "invalid_key"):
        return f"{where} is not a known key{_suggest(fault['loc'], params)}"
    if fault["type"] == "missing":
        return f"{where} is missing, expected {_allowed(fault['loc'], params)}"
    shown = SHOWN.repr(fault["input"])
    return f"{where or 'the whole file'} is {shown}, expected {_allowed(fault['loc'], params)}"


def _suggest(location: tuple, params: type[BaseModel]) -> str:
    siblings = params.model_fields
    if len(location) > 1:
        siblings = siblings[location[0]].annotation.model_fields
    close = difflib.get_close_matches(str(location[-1]), siblings, n=1)
    return f"; did you mean {close[0]}?" if close else f", expected one of {', '.join(siblings)}"


def _allowed(location: tuple, params: type[BaseModel]) -> str:
    """Say in words what the JSON schema allows at `location`."""
    if len(location) < 2:
        return "a section with " + ", ".join(
            params.model_fields[location[0]].annotation.model_fields if location else params.model_fields
        )
    section = params.model_fields[location[0]].annotation
    schema = section.model_json_schema()["properties"][location[1]]
    options = schema.get("anyOf", [schema])
    return " or ".join(_describe(option) for option in options)


def _describe(schema: dict) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if schema["type"] == "array":
        kinds = "folders, http(s) addresses or apt:<package>, in lower-case letters, digits, +, - and ."
        return f"a list of one or more {kinds}"
    words = {"integer": "an integer", "number": "a number", "null": "null", "string": "text"}[schema["type"]]
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high = schema.get("maximum")
    if low is not None:
        words += f" from {low}"
    if above is not None:
        words += f" above {above}"
    if high is not None:
        words += f" to {high}" if low is not None else f" and at most {high}"
    return words
