"""Typed settings read from YAML: strict keys, dotted overrides, errors that say what to do."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_nuwa.errors import UserError


class Settings(BaseModel):
    """Base of every settings class: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


T = TypeVar("T", bound=Settings)


def load_settings(
    kind: type[T], path: str | Path, overrides: Sequence[str] = (), noun: str = "recipe"
) -> T:
    """Read a YAML file into `kind`, with `a.b.c=value` overrides applied on top.

    Raises `UserError` that names the file, as the `noun` that it is, and the field.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{noun} {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{noun} {path} is no text in UTF-8 ({error}); save it as UTF-8") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"{noun} {path} is not valid YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(tree, dict):
        example = next(iter(kind.model_fields))
        raise UserError(f"{noun} {path} must hold fields at its top level, such as '{example}: …'")
    for override in overrides:
        _apply_override(tree, override)
    return parse_settings(kind, tree, f"{noun} {path}")


def parse_settings(kind: type[T], tree: Mapping[str, Any], origin: str) -> T:
    """Validate a tree of plain values; `UserError` names `origin` and the first wrong field."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: {_explain(kind, error)}") from error


def dump_settings(settings: Settings) -> str:
    """The settings as YAML, every default written out."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise UserError(f"override '{override}' must have the form key=value, such as seed=1")
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"override '{override}': '{parent}' is a value, not a group of fields")
        node = child
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"override '{override}': '{value}' is not a YAML value") from error


def _explain(kind: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    location = [part for part in first["loc"] if isinstance(part, str | int)]
    field = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        known = _field_names(kind, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known are: {', '.join(sorted(known))}"
        return f"unknown key '{field}'; {hint}"
    if first["type"] == "missing":
        return f"the field '{field}' is missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" if field else message


def _field_names(kind: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Names of the fields of the settings class at a location inside `kind`."""
    current: type[BaseModel] = kind
    for part in location:
        field = current.model_fields.get(str(part))
        if field is None:
            continue
        for candidate in (field.annotation, *_nested_arguments(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                current = candidate
                break
    return list(current.model_fields)


def _nested_arguments(annotation: Any) -> list[Any]:
    found: list[Any] = []
    for argument in get_args(annotation):
        found += [argument, *_nested_arguments(argument)]
    return found
