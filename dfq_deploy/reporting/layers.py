"""The layers of a model as a map: a row per kind of layer, a column per place in the network.

Layers whose names differ in numbers alone are of one kind, `blocks.*.attn.qkv`. Whatever has a value per layer or site
is laid out by it: what each is computed in, how much noise it makes.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["Cell", "Kind", "in_network_order", "kinds_of", "precision_map"]

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_QUANTIZED = ("int8", "int4", "fp8")
_SHORT = {"int8": "8", "int4": "4", "fp8": "f8", "fp32": "32", "fp16": "16", "bf16": "b16"}


@dataclass(frozen=True)
class Kind:
    """Layers, or sites, of one kind.

    Attributes:
        name: Their name, `*` for each number.
        short: What tells them apart from other kinds in the model.
        members: Their names, in the order of the network.
    """

    name: str
    short: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """A layer on the map.

    Attributes:
        layer: Its name.
        precision: What it is computed in.
        text: That in a letter or two.
        reason: Why it is float, or finer than was asked for; empty where it is as asked.
        differs: Whether it is another one in the run that this one is compared with.
    """

    layer: str
    precision: str
    text: str
    reason: str
    differs: bool = False


def kinds_of(names: Iterable[str]) -> list[Kind]:
    """The kinds that `names` are of: first those with most members, else in the order given."""
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(_NUMBER.sub("*", name), []).append(name)
    found = [Kind(kind, kind.rpartition("*.")[2], tuple(sorted(held, key=_natural))) for kind, held in members.items()]
    clear = {kind.short for kind in found if [other.short for other in found].count(kind.short) == 1}
    found = [kind if kind.short in clear else Kind(kind.name, kind.name, kind.members) for kind in found]
    return sorted(found, key=lambda kind: -len(kind.members))


def in_network_order(*precisions: Mapping[str, str]) -> list[str]:
    """The layers of several bundles of one model, in the model's order as far as these tell it.

    Each lists the layers that it quantizes and then those in float, both in the model's order. A layer that the longest
    list lacks goes behind the one that it follows in its own.
    """
    lists: list[list[str]] = []
    for precision in precisions:
        quantized = [layer for layer, kind in precision.items() if kind in _QUANTIZED]
        lists += [quantized, [layer for layer in precision if layer not in set(quantized)]]
    lists.sort(key=len, reverse=True)
    order = lists[0]
    for others in lists[1:]:
        place = 0
        for layer in others:
            if layer not in order:
                order.insert(place, layer)
            place = order.index(layer) + 1
    return order


def precision_map(
    precision: Mapping[str, str], reasons: Mapping[str, str], other: Mapping[str, str] | None = None
) -> list[tuple[Kind, list[Cell]]]:
    """The rows of the map: each kind with its layers.

    Args:
        precision: What each layer is computed in.
        reasons: Why some are float, or finer than was asked for.
        other: The same of another run, to mark what differs.
    """

    def cell(layer: str) -> Cell:
        kind = precision[layer]
        differs = other is not None and other.get(layer) != kind
        return Cell(layer, kind, _SHORT.get(kind, kind), reasons.get(layer, ""), differs)

    return [(kind, [cell(layer) for layer in kind.members]) for kind in kinds_of(precision)]


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that puts block 10 after block 9."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in name.split(".")]
