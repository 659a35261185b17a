"""YAML files read as data; what is wrong with one, said in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import yaml

from .config import ConfigError, one_line


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
