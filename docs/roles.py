"""The roles of docstrings, such as :class:`Partition`, as links of the API reference."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from griffe import Alias, Extension, Module, NameResolutionError, Object

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`([\w.]+)`")


class Roles(Extension):
    """What has no page of its own, being private or of another project, is set as code."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        for obj in _objects(pkg):
            if obj.docstring is not None:
                text = obj.docstring.value
                obj.docstring.value = ROLE.sub(lambda m, o=obj: _link(o, m[1]), text)


def _objects(obj: Object) -> Iterator[Object]:
    yield obj
    for member in obj.members.values():
        if not isinstance(member, Alias):
            yield from _objects(member)


def _link(obj: Object, name: str) -> str:
    first, dot, rest = name.partition(".")
    try:
        target = obj.resolve(first) + dot + rest
    except NameResolutionError:
        target = name
    package = obj.package
    if not target.startswith(f"{package.path}."):
        return f"`{name}`"
    try:
        package[target.removeprefix(f"{package.path}.")]
    except KeyError as error:
        raise LookupError(
            f"The docstring of {obj.path} names {target}, which is not there."
        ) from error
    return f'<autoref identifier="{target}" optional><code>{name}</code></autoref>'
