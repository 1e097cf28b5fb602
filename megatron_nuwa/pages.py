"""Self-contained HTML pages from templates that lie beside the code that fills them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render_page(
    template: Path, filters: dict[str, Callable[..., str]] | None = None, **values: object
) -> str:
    """The HTML of a Jinja template; it may use `values`, `written` (now) and `filters`.

    Values are escaped, and a name that the template asks for in vain is an error.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    written = datetime.now().strftime("%d %B %Y, %H:%M")
    return environment.get_template(template.name).render(written=written, **values)
