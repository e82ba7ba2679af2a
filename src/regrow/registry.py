"""Named knowledge (criteria, families, spreads ...): a folder of files, walked at first use.

A file registers what it declares when it is imported; nothing keeps a second list of names. An import
error in such a file is raised, never swallowed. What this gives up: plugins from other packages.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Generic, TypeVar

from regrow.errors import UnknownName

T = TypeVar("T")


class Registry(Generic[T]):
    """`Registry("criterion", "regrow.criteria")`: get, names, items; the folder is read when first asked."""

    def __init__(self, noun: str, package: str) -> None:
        self.noun, self.package = noun, package
        self._items: dict[str, T] = {}
        self._walked = False

    def add(self, name: str, item: T) -> T:
        """Register `item`; the same name twice is a programming error and raises at once."""
        if name in self._items:
            raise ValueError(f"{self.noun} {name!r} is registered twice: names must differ")
        self._items[name] = item
        return item

    def get(self, name: str) -> T:
        """The item called `name`, with `_` for `-` if need be. Raises `UnknownName` with the nearest names and all."""
        self._walk()
        name = name if name in self._items else name.replace("_", "-")
        if name not in self._items:
            raise UnknownName(self.noun, name, self._items)
        return self._items[name]

    def names(self) -> list[str]:
        self._walk()
        return sorted(self._items)

    def items(self) -> Iterator[tuple[str, T]]:
        self._walk()
        return iter(sorted(self._items.items()))

    def _walk(self) -> None:
        if self._walked:
            return
        folder = importlib.import_module(self.package)
        for found in pkgutil.iter_modules(folder.__path__):
            importlib.import_module(f"{self.package}.{found.name}")
        self._walked = True
