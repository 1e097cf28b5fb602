"""Items as JSON, for plans on disk and processes that share no memory."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

from pydantic import TypeAdapter

from preprocessing.sources import SourceItem, TarMember

_ITEM: TypeAdapter[SourceItem] = TypeAdapter(SourceItem)
# How JSON tells a local path from an address.
_PATH = "local path"


def tree_of_item(item: SourceItem) -> dict[str, Any]:
    """The item as plain values that JSON can hold."""
    return {name: _plain(value) for name, value in vars(item).items()}


def item_of_tree(tree: dict[str, Any]) -> SourceItem:
    """The item that `tree_of_item` was given."""
    return _ITEM.validate_python(_with_paths(tree))


def _plain(value: Any) -> Any:
    if isinstance(value, PurePath):
        return {_PATH: str(value)}
    if isinstance(value, TarMember):
        return {name: _plain(part) for name, part in vars(value).items()}
    return value


def _with_paths(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value.keys() == {_PATH}:
        return Path(value[_PATH])
    return {key: _with_paths(part) for key, part in value.items()}
