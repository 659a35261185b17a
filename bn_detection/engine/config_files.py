"""Config files read as data, and what is wrong with one said with its file and line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import yaml
from detectron2.config import CfgNode
from fvcore.common import config as fvcore_config
from fvcore.common.config import BASE_KEY

from ..config import ConfigError, one_line
from ..data.coco_paths import beside_config
from ..substitutes import substituted
from ..yaml_files import DataLoader, load, reading_yaml

_MOST_BASES = 100
_OF_MERGING = (KeyError, ValueError, AssertionError, TypeError, AttributeError)
"""What yacs and Detectron2 raise for keys and values that are wrong."""
_MISMATCH = re.compile(
    r"Type mismatch \(<class '(?P<old>[^']+)'> vs\. <class '(?P<new>[^']+)'>\) "
    r"with values \((?P<values>.*)\) for config key: (?P<key>\S+)$"
)


def merge_config_file(cfg: CfgNode, path: str) -> None:
    """Merge a YAML config file with its ``_BASE_`` files into ``cfg``, in place.

    The files are data: a tag that would run code (``!!python/...``), which Detectron2 obeys, is
    refused; the arithmetic of Detectron2's model zoo is computed. Relative paths in
    DATASETS.COCO_JSON are relative to the file that has them.

    Args:
        cfg: with all the keys that the file may have.
        path: of the file.

    Raises:
        ConfigError: a file is missing or cannot be read, is no YAML or no mapping; a key or the
            type of a value is wrong. Names the file, and the line where there is one.
    """
    name = f"--config-file {path}"
    files = list(_with_bases(path, name))
    for file in files:
        for key in _no_groups(cfg, file.content):
            raise ConfigError(f"{_at(file, files, key, name)}: {key} takes a group of keys.")
    try:
        with _safe():
            cfg.merge_from_file(path, allow_unsafe=False)
    except _OF_MERGING as error:
        raise ConfigError(f"{name}{_where(error, files)}: {_reason(error)}") from error
    owner = next((file for file in files if "DATASETS.COCO_JSON" in file.lines), None)
    if owner is not None:
        cfg.DATASETS.COCO_JSON = beside_config(cfg.DATASETS.COCO_JSON, owner.path)


def read_config_file(path: str) -> dict[str, Any]:
    """The content of a YAML config file with that of its ``_BASE_`` files, as data.

    Args:
        path: of a file that :func:`merge_config_file` has taken.
    """
    with _safe():
        return CfgNode.load_yaml_with_base(path, allow_unsafe=False)


@contextmanager
def _safe() -> Iterator[None]:
    """While it lasts, fvcore loads YAML by the loader of this project."""
    ours = SimpleNamespace(safe_load=load, constructor=yaml.constructor)
    with substituted(fvcore_config, "yaml", ours):
        yield


def merge_overrides(cfg: CfgNode, overrides: list[str]) -> None:
    """Merge ``KEY VALUE ...`` of a command line into ``cfg``, in place.

    Raises:
        ConfigError: a key has no value, or a key or the type of a value is wrong.
    """
    if len(overrides) % 2:
        raise ConfigError(f"KEY VALUE overrides: {overrides[-1]} has no value.")
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        try:
            cfg.merge_from_list([key, value])
        except (*_OF_MERGING, RecursionError, MemoryError) as error:
            # yacs looks for the key in a value.
            no_key = isinstance(error, TypeError) and "is not iterable" in str(error)
            reason = "there is no such key." if no_key else _reason(error)
            raise ConfigError(f"KEY VALUE overrides: {key} {_short(value)}: {reason}") from error


class _File:
    """A config file: its keys with dots, each with its line from 1."""

    def __init__(self, path: str, root: yaml.MappingNode, content: dict[str, Any]) -> None:
        self.path = path
        self.content = content
        self.lines = dict(_lines(root))


def _with_bases(path: str, name: str, depth: int = 0) -> Iterator[_File]:
    """A file and those that it is based on, each checked to be a mapping of YAML."""
    if depth > _MOST_BASES:
        raise ConfigError(f"{name}: {BASE_KEY} leads in a circle.")
    root, content = _read(path, name)
    yield _File(path, root, content)
    if BASE_KEY not in content:
        return
    bases = content[BASE_KEY]
    for base in bases if isinstance(bases, list) else [bases]:
        where = f"{_named(name, path)}, line {_line_of_base(root)}: {BASE_KEY} {base!r}"
        if not isinstance(base, str):
            raise ConfigError(f"{where}: it must be the path of a config file.")
        if base.startswith(("https://", "http://")):  # Detectron2 fetches it
            continue
        base = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        if not os.path.isfile(base):
            raise ConfigError(f"{where}: there is no file {os.path.normpath(base)}.")
        if base.endswith(".py"):
            raise ConfigError(
                f"{where}: a base is YAML. A LazyConfig is code, which runs where --config-file "
                "names it alone."
            )
        yield from _with_bases(base, name, depth + 1)


def _read(path: str, name: str) -> tuple[yaml.MappingNode, dict[str, Any]]:
    where = _named(name, path)
    with reading_yaml(where):
        with open(path, encoding="utf-8") as file:
            loader = DataLoader(file.read())
        root = loader.get_single_node()
        content = None if root is None else loader.construct_document(root)
    if not isinstance(content, dict):
        kind = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise ConfigError(f"{where} {kind}; a config file is a mapping of keys to values.")
    for key, _, line in _entries(root):
        if key.tag != "tag:yaml.org,2002:str":
            raise ConfigError(f"{where}, line {line}: the key {key.value} is no text.")
    return root, content


def _named(name: str, path: str) -> str:
    return name if name.endswith(f" {path}") else f"{name}: {path}"


def _line_of_base(root: yaml.MappingNode) -> int:
    return next(line for key, _, line in _entries(root) if key.value == BASE_KEY)


def _entries(node: yaml.Node) -> Iterator[tuple[yaml.Node, yaml.Node, int]]:
    """Keys, values and lines of a mapping and those in it, except those that lists hold."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key, value, key.start_mark.line + 1
            yield from _entries(value)


def _lines(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield f"{prefix}{key.value}", key.start_mark.line + 1
            yield from _lines(value, f"{prefix}{key.value}.")


def _where(error: Exception, files: list[_File]) -> str:
    """The file and line of the key that an error of merging names, if it can be told."""
    words = {word.strip("'\".,;:") for word in _reason(error).split()}
    for file in files:
        named = [key for key in file.lines if key in words]
        if named:
            return _at(file, files, max(named, key=len))
    return ""


def _at(file: _File, files: list[_File], key: str, name: str = "") -> str:
    line = f", line {file.lines[key]}"
    return name + (line if file is files[0] else f": {file.path}{line}")


def _no_groups(cfg: CfgNode, content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The keys whose values are no mapping, where those of ``cfg`` are."""
    for key, value in content.items():
        if isinstance(cfg.get(key), CfgNode):
            if isinstance(value, dict):
                yield from _no_groups(cfg[key], value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"


def _reason(error: Exception) -> str:
    """What yacs says, shortened; a KeyError's text has quotes around it."""
    is_key = isinstance(error, KeyError) and error.args
    text = " ".join(str(error.args[0] if is_key else error).split()) or one_line(error)
    if mismatch := _MISMATCH.match(text):
        value = _short(mismatch["values"].rpartition(" vs. ")[2])
        expected, found = (mismatch[name].split(".")[-1] for name in ("old", "new"))
        expected = "a group of keys" if expected == "CfgNode" else f"a value of type {expected}"
        return f"{mismatch['key']} takes {expected}, not {value} of type {found}."
    return text


def _short(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:60]}..."
