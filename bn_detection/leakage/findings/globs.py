"""The fewest globs of module names for some layers of a model and no others."""

from __future__ import annotations

import fnmatch
import glob as files
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import islice, permutations

from ...norm import lineage

_ORDERS = 24  # of positions to widen, of one layer and depth
_MOST_GLOBS = 6  # up to which fewer are looked for; then each takes the most layers


def fewest_globs(wanted: Sequence[str], others: Iterable[str]) -> list[str]:
    """Globs as BN.CONVERT takes them: the layers at and below the modules that match are these.

    A part of a glob is a name, a name with one character of several (``conv[12]``), or ``*``. Of
    such globs that match as many layers as they can, the fewest are taken, and of those that match
    the same layers the one with the least wildcards.

    Args:
        wanted: names of layers.
        others: names of the layers that no glob may match.

    Returns:
        The globs, in the order of the first layers that they match; none for no layers.
    """
    names = {name: lineage(name)[1:] for name in wanted}
    forbidden = {part for name in others for part in lineage(name)[1:]} - set(wanted)
    is_exact = cache(lambda glob: glob is not None and not _matches(glob, forbidden))
    found: dict[frozenset[str], str] = {}
    for name in wanted:
        for glob in _widest(name, wanted, is_exact):
            layers = frozenset(name for name, parts in names.items() if _matches(glob, parts))
            found[layers] = min(found.get(layers, glob), glob, key=_wildcards)
    widest = [s for s in found if not any(s < other for other in found)]
    widest.sort(key=lambda layers: (-len(layers), _wildcards(found[layers])))
    chosen = next(
        (cover for most in range(_MOST_GLOBS) if (cover := _cover(set(wanted), widest, most))), None
    )
    if chosen is None:
        chosen, left = [], set(wanted)
        while left:
            chosen.append(max(widest, key=lambda layers: len(layers & left)))
            left -= chosen[-1]
        for layers in list(chosen):  # what was taken first may be in what was taken later
            rest = [other for other in chosen if other != layers]
            chosen = rest if layers <= frozenset().union(*rest) else chosen
    chosen.sort(key=lambda layers: min(map(list(wanted).index, layers)))
    return [found[layers] for layers in chosen]


def _cover(left: set[str], sets: list[frozenset[str]], most: int) -> list[frozenset[str]] | None:
    """At most so many of the sets that have all of ``left`` together."""
    if not left:
        return []
    if most * max((len(s & left) for s in sets), default=0) < len(left):
        return None
    rarest = min(sorted(left), key=lambda name: sum(name in s for s in sets))
    for s in sets:
        if rarest in s and (rest := _cover(left - s, sets, most - 1)) is not None:
            return [s, *rest]
    return None


def _widest(
    name: str, names: Sequence[str], is_exact: Callable[[str | None], bool]
) -> Iterator[str]:
    """Globs for a layer, or a module that it is in, that cannot be widened."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        first = [[part] for part in parts[:depth]]
        if not is_exact(_glob(first)):
            continue
        peers = [other.split(".")[:depth] for other in names if other.count(".") >= depth - 1]
        values = [sorted({peer[k] for peer in peers}) for k in range(depth)]
        several = [k for k in range(depth) if len(values[k]) > 1]
        for order in islice(permutations(several), _ORDERS):
            widened = list(first)
            for k in order:
                for value in values[k]:
                    wider = [*widened[:k], sorted({*widened[k], value}), *widened[k + 1 :]]
                    widened = wider if is_exact(_glob(wider)) else widened
                anything = [*widened[:k], ["*"], *widened[k + 1 :]]
                widened = anything if is_exact(_glob(anything)) else widened
            yield (glob := str(_glob(widened)))
            if is_exact(shorter := re.sub(r"\*(\.\*)+", "*", glob)):  # "*" matches dots too
                yield shorter


def _glob(places: Sequence[Sequence[str]]) -> str | None:
    """Of the values of each part of a name, or None where no glob has exactly these."""
    parts = [_part(values) for values in places]
    return None if None in parts else ".".join(map(str, parts))


def _part(values: Sequence[str]) -> str | None:
    if values[0] == "*" or len(values) == 1:
        return "*" if values[0] == "*" else files.escape(values[0])
    first = values[0]
    differing = [k for k in range(len(first)) if len({value[k : k + 1] for value in values}) > 1]
    if len({len(value) for value in values}) > 1 or len(differing) != 1:
        return None
    (k,) = differing
    letters = "".join(value[k] for value in values)
    start, end = files.escape(first[:k]), files.escape(first[k + 1 :])
    return f"{start}[{letters}]{end}" if letters.isalnum() else None


def _matches(glob: str, names: Iterable[str]) -> bool:
    match = re.compile(fnmatch.translate(glob)).match
    return any(map(match, names))


def _wildcards(glob: str) -> tuple[int, int]:
    return glob.count("*") + glob.count("["), len(glob)
