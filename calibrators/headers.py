"""The JSON header of a file that anybody may have written: read to the last field, or refused.

Plans, sets of images and bundles say in one what they hold. A later version may say what this one cannot know: that is
told as such, since the remedy is another one than for a damaged file.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from calibrators.errors import DeployError

__all__ = ["header_of", "later", "newer"]

_Error = TypeVar("_Error", bound=DeployError)
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # they would steer a terminal


def header_of(text: str | bytes) -> dict[str, Any]:
    """The JSON object in `text`.

    Raises:
        ValueError: It is none, is nested too deeply, or holds characters that are no text.
    """
    try:
        header = json.loads(text if isinstance(text, str) else text.decode())
    except RecursionError as cause:
        message = "it is nested too deeply"
        raise ValueError(message) from cause
    if not isinstance(header, dict):
        message = f"it holds a {type(header).__name__}, not an object"
        raise ValueError(message)
    if found := _UNPRINTABLE.search(" ".join(_texts(header))):
        message = f"it holds the control character {found[0]!r}"
        raise ValueError(message)
    return header


def newer(header: Mapping[str, Any], *, reads: int, known: Collection[str]) -> str | None:
    """What of `header` shows that a later version wrote it; None if nothing does.

    Args:
        header: What a file says of itself.
        reads: The format that this version reads.
        known: The fields that the format has.
    """
    number = header.get("format")
    if isinstance(number, int) and number > reads:
        return f"it has format {number}, and this version reads format {reads}."
    unknown = sorted(header.keys() - known)
    return f"it has a field `{unknown[0]}`, which format {reads} does not have." if unknown else None


def later(error: type[_Error], path: Path, why: str) -> _Error:
    """The error for a file that a later version wrote, as `newer` says."""
    return error(
        what=f"`{path}` seems to be of a later version of dfq-deploy.",
        why=why,
        fix="upgrade dfq-deploy (`dfq-deploy --version` says which one this is), or make the file again with it.",
    )


def _texts(value: object) -> list[str]:
    """All strings in a JSON value, names of fields among them."""
    found, left = [], [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, dict):
            found += item.keys()
            left += item.values()
        elif isinstance(item, list):
            left += item
    return found
