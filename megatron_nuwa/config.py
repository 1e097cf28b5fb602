"""Typed settings read from YAML: strict keys, dotted overrides, errors that say what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_nuwa.errors import UserError
from megatron_nuwa.mistakes import explain


class Settings(BaseModel):
    """Base of every settings class: immutable, finite, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


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
        _check_fields_are_unique(yaml.compose(text, yaml.SafeLoader))
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


def parse_settings(
    kind: type[T], tree: Mapping[str, Any], origin: str, flags: Mapping[str, str] | None = None
) -> T:
    """Validate a tree of plain values; `UserError` names `origin` and a wrong field.

    `flags` has the names that fields have on a command line, such as `--fps`.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: {explain(error, tree, kind, flags or {})}") from error


def _check_fields_are_unique(root: yaml.Node | None) -> None:
    """Raise `YAMLError` where a field stands twice in a group, of which PyYAML takes the last."""
    waiting, looked_at = [root], set()
    while waiting:
        node = waiting.pop()
        # Aliases lead to a node again and again.
        if id(node) in looked_at:
            continue
        looked_at.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        if not isinstance(node, yaml.MappingNode):
            continue
        fields: dict[str, yaml.Node] = {}
        for key, value in node.value:
            waiting.append(value)
            first = fields.setdefault(str(key.value), key)
            if first is not key:
                raise yaml.YAMLError(
                    f"'{key.value}' stands in lines {first.start_mark.line + 1} and "
                    f"{key.start_mark.line + 1} of the same group; leave one out"
                )


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
            child = {}
        if not isinstance(child, dict):
            raise UserError(f"override '{override}': '{parent}' is a value, not a group of fields")
        # By an anchor, another group may be the same object.
        node[parent] = dict(child)
        node = node[parent]
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"override '{override}': '{value}' is not a YAML value") from error
