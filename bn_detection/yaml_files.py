"""YAML files read as data; what is wrong with one, said in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from .arithmetic import compute
from .config import ConfigError, one_line

_EVAL = "tag:yaml.org,2002:python/object/apply:eval"


class DataLoader(yaml.SafeLoader):
    """YAML's safe loader, which computes what Detectron2's model zoo has ``eval`` do.

    Its Base-RetinaNet.yaml, and configs that began as a copy of it, write the sizes of anchors as
    ``!!python/object/apply:eval ["[... for x in ...]"]``. It is arithmetic, and not run as code.
    """


def _arithmetic(loader: DataLoader, node: yaml.Node) -> Any:
    try:
        (text,) = loader.construct_sequence(node)
        return compute(text)
    except (ValueError, AttributeError) as error:
        raise yaml.constructor.ConstructorError(
            None, None, f"the tag {_EVAL} is for lists of numbers: {error}", node.start_mark
        ) from error


DataLoader.add_constructor(_EVAL, _arithmetic)


def load(stream: Any) -> Any:
    """``yaml.safe_load`` by :class:`DataLoader`."""
    return yaml.load(stream, DataLoader)  # a subclass of the safe one


@contextmanager
def reading_yaml(where: str) -> Iterator[None]:
    """Turn what reading and loading a YAML file raises into one line.

    Args:
        where: the file, and what asks for it.

    Raises:
        ConfigError: the file cannot be read, is no text in UTF-8, no YAML, or has a tag that is not
            data. Names the line, if there is one.
    """
    try:
        yield
    except ConfigError:
        raise
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where} is no text in UTF-8: {error.reason} at byte {error.start}."
        ) from error
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: {_problem(error)}.") from error
    # Of values that are no dates, numbers or keys, and of lists in lists without an end.
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{where} cannot be read as YAML: {one_line(error)}") from error


def _problem(error: yaml.MarkedYAMLError) -> str:
    if isinstance(error, yaml.constructor.ConstructorError) and "tag" in (error.problem or ""):
        return f"{error.problem}; the file is data, and a tag that names code is not obeyed"
    return " ".join(f"{error.context or ''} {error.problem or ''}".split())
