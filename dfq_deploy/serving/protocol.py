"""The KServe v2 inference protocol, read and written: bytes in, images asked for; logits in, bytes out.

JSON, Triton's extensions for binary tensors and for classification, and its raw requests, whose body is the tensor and
nothing else. In JSON an encoded image is base64. A model here has one input and one output, `logits`. No HTTP library
here, and no engine.

Source: https://kserve.github.io/website, "Open Inference Protocol", and the protocol documents of
triton-inference-server/server: extension_binary_data, extension_classification.
"""

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from calibrators.errors import DeployError

__all__ = ["HEADER_LENGTH", "Asked", "RequestError", "Served", "parse", "render"]

HEADER_LENGTH = "Inference-Header-Content-Length"
_VERSION = "1"
_EXTENT = Annotated[int, Field(ge=0, lt=2**31)]


class RequestError(DeployError):
    """A request that cannot be answered as it is.

    Attributes:
        status: The HTTP status that says so.
    """

    def __init__(self, status: int = 400, *, what: str, why: str, fix: str) -> None:
        self.status = status
        super().__init__(what=what, why=why, fix=fix)


@dataclass(frozen=True)
class Served:
    """A model as clients see it.

    Attributes:
        name: What it is called.
        platform: What runs it, in Triton's words.
        encoded: It takes image files, not the model's own tensor.
        image: Shape of one image of that tensor.
        classes: Number of logits.
        labels: What they stand for, where it is known.
        largest: Most images of a request.
    """

    name: str
    platform: str
    encoded: bool
    image: tuple[int, ...]
    classes: int
    labels: Sequence[str] | None
    largest: int

    @property
    def input(self) -> dict[str, Any]:
        """Its input, as metadata has it."""
        if self.encoded:
            return {"name": "encoded", "datatype": "BYTES", "shape": [-1, 1]}
        return {"name": "images", "datatype": "FP32", "shape": [-1, *self.image]}

    def metadata(self) -> dict[str, Any]:
        """What the protocol tells of a model."""
        logits = {"name": "logits", "datatype": "FP32", "shape": [-1, self.classes]}
        told = {"name": self.name, "versions": [_VERSION], "platform": self.platform}
        return {**told, "inputs": [self.input], "outputs": [logits]}


class _Tensor(BaseModel):
    name: str
    parameters: dict[str, Any] = {}

    def refuse_shared_memory(self) -> None:
        if "shared_memory_region" in self.parameters:
            raise RequestError(
                what=f"`{self.name}` lies in shared memory.",
                why="this server has no such extension.",
                fix="send and ask for the data itself.",
            )


class _Input(_Tensor):
    shape: list[_EXTENT]
    datatype: str
    data: Any = None


class _Request(BaseModel):
    id: str | None = None
    parameters: dict[str, Any] = {}
    inputs: list[_Input]
    outputs: list[_Tensor] = []


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        id: Its name for itself.
        images: The model's own tensor (N, C, H, W) float32, or image files.
        binary: Send the logits as bytes.
        top: Send this many classes in place of the logits; 0 for the logits.
    """

    id: str | None
    images: np.ndarray | list[bytes]
    binary: bool
    top: int


def parse(body: bytes, header_length: str | None, served: Served) -> Asked:
    """What `body` asks of `served`.

    Raises:
        RequestError: It cannot be read, or asks for something else than the model has.
    """
    if header_length is None:
        header, tail = body, b""
    else:
        is_length = header_length.isascii() and header_length.isdigit() and len(header_length) < 16
        length = int(header_length) if is_length else len(body) + 1
        if length > len(body):
            what, why = f"{HEADER_LENGTH} `{header_length}` is no length.", f"the body has {len(body)} bytes."
            raise RequestError(what=what, why=why, fix="send the length of the JSON that comes first.")
        if length == 0:
            return Asked(None, _raw(body, served), True, 0)
        header, tail = body[:length], body[length:]
    request = _read(header)
    (given,) = request.inputs if len(request.inputs) == 1 else (None,)
    wanted = served.input
    if given is None or (given.name, given.datatype) != (wanted["name"], wanted["datatype"]):
        got = ", ".join(f"`{tensor.name}` {tensor.datatype}" for tensor in request.inputs) or "nothing"
        what = f"`{served.name}` takes one input, `{wanted['name']}` {wanted['datatype']}, and got {got}."
        raise RequestError(what=what, why="its metadata says so.", fix="send that.")
    given.refuse_shared_memory()
    _check_shape(given.shape, served)
    images = _tensor(given, tail, served)
    return Asked(request.id, images, *_output(request, served))


def render(asked: Asked, logits: np.ndarray, served: Served) -> tuple[bytes, dict[str, str]]:
    """The answer to `asked`, as a body and its headers."""
    output: dict[str, Any] = {"name": "logits"}
    values: list[Any]
    if asked.top:
        rows = [_top(row, asked.top, served.labels) for row in logits]
        output |= {"datatype": "BYTES", "shape": [len(rows), len(rows[0])]}
        values = [text for row in rows for text in row]
        data = b"".join(len(text.encode()).to_bytes(4, "little") + text.encode() for text in values)
    else:
        output |= {"datatype": "FP32", "shape": list(logits.shape)}
        values, data = [], logits.astype("<f4").tobytes()
    told = {"model_name": served.name, "model_version": _VERSION}
    if asked.id is not None:
        told["id"] = asked.id
    if not asked.binary:
        output["data"] = values if asked.top else logits.ravel().tolist()
        text = json.dumps({**told, "outputs": [output]}, allow_nan=False)
        return text.encode(), {"Content-Type": "application/json"}
    output["parameters"] = {"binary_data_size": len(data)}
    header = json.dumps({**told, "outputs": [output]}).encode()
    return header + data, {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(header))}


def _read(header: bytes) -> _Request:
    try:
        return _Request.model_validate_json(header)
    except ValidationError as cause:
        first = cause.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RequestError(
            what="the request is no inference request.",
            why=f"{first['msg']}{f' at `{where}`' if where else ''}.",
            fix="send JSON as the KServe v2 inference protocol has it.",
        ) from cause


def _check_shape(shape: list[int], served: Served) -> None:
    wanted = served.input["shape"]
    if len(shape) != len(wanted) or shape[1:] != wanted[1:] or not 1 <= shape[0] <= served.largest:
        told = ", ".join(map(str, wanted[1:]))
        raise RequestError(
            what=f"shape {shape} does not fit `{served.name}`.",
            why=f"it takes [N, {told}], N from 1 to {served.largest}.",
            fix="send such a tensor, or several requests.",
        )


def _tensor(given: _Input, tail: bytes, served: Served) -> np.ndarray | list[bytes]:
    size = given.parameters.get("binary_data_size")
    if size is not None or given.data is None:
        if size != len(tail):
            raise RequestError(
                what=f"the data of `{given.name}` is not there.",
                why=f"it should be {size} bytes after the JSON, where there are {len(tail)}.",
                fix="send `data`, or the size as `binary_data_size` and the bytes.",
            )
        return _elements(tail, given.shape[0]) if served.encoded else _floats(tail, given.shape)
    if served.encoded:
        return _decoded(given.data, given.shape[0])
    try:
        with np.errstate(over="ignore"):  # it becomes infinite, which is refused below
            values = np.asarray(given.data, np.float32)
    except (TypeError, ValueError, OverflowError) as cause:
        raise _not_numbers(given.shape, "`data` holds something else, or rows of unequal lengths.") from cause
    return _finite(values, given.shape)


def _raw(body: bytes, served: Served) -> np.ndarray | list[bytes]:
    """The tensor of a request that is nothing but a tensor: one image file, or as many images as there are bytes."""
    if served.encoded:
        return [body]
    shape = [len(body) // (4 * prod(served.image)), *served.image]
    _check_shape(shape, served)
    return _floats(body, shape)


def _floats(data: bytes, shape: list[int]) -> np.ndarray:
    if len(data) != 4 * prod(shape):
        raise _not_numbers(shape, f"it takes {4 * prod(shape)} bytes, and there are {len(data)}.")
    return _finite(np.frombuffer(data, "<f4"), shape)


def _finite(values: np.ndarray, shape: list[int]) -> np.ndarray:
    if values.size != prod(shape):
        raise _not_numbers(shape, f"it takes {prod(shape)} numbers, and there are {values.size}.")
    if not np.isfinite(values).all():
        raise _not_numbers(shape, "one of them is NaN, infinite or too large for 32 bits.")
    return values.reshape(shape)


def _not_numbers(shape: list[int], why: str) -> RequestError:
    return RequestError(what=f"the data is no tensor of shape {shape}.", why=why, fix="send finite 32-bit numbers.")


def _elements(data: bytes, n: int) -> list[bytes]:
    """`n` strings of bytes, each with its length in four bytes before it."""
    found: list[bytes] = []
    at = 0
    while at + 4 <= len(data) and len(found) < n:
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        found.append(data[at + 4 : end])
        at = end
    if len(found) != n or at != len(data):
        raise RequestError(
            what=f"the data is no BYTES tensor of {n} elements.",
            why="lengths and bytes do not come out even.",
            fix="send each element as its length, four bytes, little-endian, and its bytes.",
        )
    return found


def _decoded(data: Any, n: int) -> list[bytes]:
    """`n` strings of bytes, given as base64 in a list, flat or in rows of one."""
    rows = data if isinstance(data, list) else []
    flat = [row[0] if isinstance(row, list) and len(row) == 1 else row for row in rows]
    try:
        if len(flat) == n:
            return [base64.b64decode(text, validate=True) for text in flat]
        cause: Exception | None = None
    except (binascii.Error, TypeError, ValueError) as error:
        cause = error
    what, why = f"`data` is no list of {n} encoded images.", "in JSON each is a string of base64."
    raise RequestError(what=what, why=why, fix="send base64, or bytes after the JSON.") from cause


def _output(request: _Request, served: Served) -> tuple[bool, int]:
    """Whether the answer is to be binary, and how many classes it is to name."""
    binary = request.parameters.get("binary_data_output", False)
    if not request.outputs:
        return bool(binary), 0
    (asked,) = request.outputs if len(request.outputs) == 1 else (None,)
    if asked is None or asked.name != "logits":
        what = f"`{served.name}` has one output, `logits`."
        raise RequestError(what=what, why="its metadata says so.", fix="ask for that, or for no output by name.")
    asked.refuse_shared_memory()
    top = asked.parameters.get("classification", 0)
    if not isinstance(top, int) or top < 0:
        what = f"`classification` {top} is no number of classes."
        raise RequestError(what=what, why="it counts the classes to name.", fix="send a number from 1 on.")
    return bool(asked.parameters.get("binary_data", binary)), min(top, served.classes)


def _top(row: np.ndarray, n: int, labels: Sequence[str] | None) -> list[str]:
    """The `n` largest logits as `value:index`, or `value:index:label`, the largest first."""
    indices = np.argsort(-row, kind="stable")[:n].tolist()
    names = [f":{labels[index]}" if labels else "" for index in indices]
    return [f"{row[index]:f}:{index}{name}" for index, name in zip(indices, names, strict=True)]
