"""Pydantic's objections to settings, as one sentence: field, what is expected, what was found."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_NO_FLAGS: Mapping[str, str] = MappingProxyType({})
_LONGEST_FOUND = 60
# How pydantic marks a key of a mapping that will not do.
_KEY = "[key]"
_GROUP = "be a group of fields"
_LIST = "be a list such as [a, b]"
# Ends of "FIELD must …" by pydantic's type of error; the braces are filled from its context.
_MUST = {
    **dict.fromkeys(
        ("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "be a whole number"
    ),
    **dict.fromkeys(("float_type", "float_parsing"), "be a number"),
    "finite_number": "be a finite number",
    **dict.fromkeys(("bool_type", "bool_parsing"), "be true or false"),
    "string_type": "be text",
    "path_type": "be a path",
    **dict.fromkeys(("list_type", "tuple_type"), _LIST),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), _GROUP),
    "greater_than": "be above {gt}",
    "greater_than_equal": "be at least {ge}",
    "less_than": "be below {lt}",
    "less_than_equal": "be at most {le}",
    "multiple_of": "be a multiple of {multiple_of}",
    **dict.fromkeys(("literal_error", "enum"), "be {expected}"),
    "union_tag_invalid": "be one of {expected_tags}",
    "too_short": "hold at least {min_length}",
    "too_long": "hold at most {max_length}",
}


def explain(
    error: ValidationError,
    tree: object,
    kind: type[BaseModel] | None = None,
    flags: Mapping[str, str] = _NO_FLAGS,
    section: str = "",
) -> str:
    """The mistake in `tree` that helps most, as a sentence without its end.

    `kind` is the settings class that `tree` was to become, for the name that a misspelt key is
    nearest to; `flags` names fields as the user wrote them, such as `--fps`; `section` is where the
    whole tree stands.
    """
    errors = error.errors()
    # A misspelt key often leaves another one missing, and says more.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    path = _path(first, tree)

    def name(path: Sequence[str | int]) -> str:
        field = ".".join(map(str, ([section] if section else []) + [*path]))
        return flags.get(field, field)

    if first["type"] == "extra_forbidden":
        known = [] if kind is None else _field_names(kind, path[:-1])
        return f"unknown key '{name(path)}'{_hint(str(path[-1]), known)}"
    if first["type"] == "missing" and path and isinstance(path[-1], int):
        return f"{name(path[:-1])} has too few entries: {found(_value(tree, path[:-1]))}"
    if first["type"] == "missing":
        return f"the field '{name(path)}' is missing"
    if first["type"] == "union_tag_not_found":
        return f"the field '{name([*path, _tag(first)])}' is missing"
    # The branches of a union complain one by one about the same value.
    musts = [_must(e) for e in errors if _path(e, tree) == path]
    must = " or ".join(dict.fromkeys(must for must in musts if must))
    if first["type"] == "union_tag_invalid":
        return f"{name([*path, _tag(first)])} must {must}, not {found(first['ctx']['tag'])}"
    if first["loc"][-1:] == (_KEY,) and must:
        return f"the key '{path[-1]}' of {name(path[:-1])} must {must}"
    if must:
        return f"{name(path) or 'it'} must {must}, {_but(first['input'])}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{name(path)}: {message}" if path else message


def _but(value: object) -> str:
    return "but is empty" if value is None else f"not {found(value)}"


def found(value: object) -> str:
    """A value as a settings file would have it, short enough for a sentence."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, Mapping) and value:
        return f"a group of fields ({textwrap.shorten(', '.join(map(str, value)), _LONGEST_FOUND)})"
    if isinstance(value, list | tuple):
        value = f"[{', '.join(map(found, value))}]"
    elif not isinstance(value, int | float | Mapping):
        value = f"'{value}'"
    text = str(value)
    return text if len(text) <= _LONGEST_FOUND else f"{text[: _LONGEST_FOUND - 1]}…"


def _must(error: ErrorDetails) -> str | None:
    """How a sentence with 'must' ends for this error; None where pydantic's own words are used."""
    form = _MUST.get(error["type"])
    if form is None:
        return None
    context = {
        name: value if isinstance(value, str) else found(value)
        for name, value in error.get("ctx", {}).items()
    }
    return form.format(**context)


def _tag(error: ErrorDetails) -> str:
    return str(error["ctx"]["discriminator"]).strip("'")


def _path(error: ErrorDetails, tree: object) -> tuple[str | int, ...]:
    """Where the error is in the tree, without the names of union branches between."""
    return tuple(_steps(error, tree))


def _steps(error: ErrorDetails, tree: Any) -> Iterator[str | int]:
    location = error["loc"]
    for number, part in enumerate(location):
        if _holds(tree, part):
            tree = tree[part]
        elif error["type"] != "missing" or number < len(location) - 1:
            continue
        yield part


def _holds(tree: object, part: str | int) -> bool:
    if isinstance(tree, list | tuple):
        return isinstance(part, int) and part < len(tree)
    return isinstance(tree, Mapping) and part in tree


def _value(tree: Any, path: Sequence[str | int]) -> object:
    for part in path:
        tree = tree[part]
    return tree


def _hint(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known are: {', '.join(sorted(known))}" if known else ""


def _field_names(kind: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Names of the fields of the settings class, or classes, at a place inside `kind`."""
    kinds = [kind]
    for part in path:
        fields = [k.model_fields[str(part)] for k in kinds if str(part) in k.model_fields]
        nested = [each for field in fields for each in _nested(field.annotation)]
        kinds = [m for m in nested if isinstance(m, type) and issubclass(m, BaseModel)] or kinds
    return [name for kind in kinds for name in kind.model_fields]


def _nested(annotation: Any) -> list[Any]:
    return [annotation, *(n for argument in get_args(annotation) for n in _nested(argument))]
