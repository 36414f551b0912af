"""The protocol, read and written: what is asked comes out as it was sent, and whatever is not understood is refused."""

import base64
import gzip
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfq_deploy.serving.app import _expanded
from dfq_deploy.serving.protocol import Asked, RequestError, Served, parse, render

_PLAIN = Served("m", "onnxruntime_onnx", False, (1, 2, 2), 4, ["a", "b", "c:d", "e"], 3)
_ENCODED = Served("m_encoded", "ensemble", True, (1, 2, 2), 4, None, 3)
_IMAGES = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)
_FILES = [b"\x89PNG", b"", b"\xff\xd8"]


def _input(**changed: Any) -> dict[str, Any]:
    return {"name": "images", "datatype": "FP32", "shape": [2, 1, 2, 2], "data": _IMAGES.tolist()} | changed


def _encoded(**changed: Any) -> dict[str, Any]:
    return _input(name="encoded", datatype="BYTES", shape=[3, 1]) | changed


def _body(*inputs: Any, tail: bytes = b"", **more: Any) -> tuple[bytes, str]:
    header = json.dumps({"inputs": inputs, **more}).encode()
    return header + tail, str(len(header))


def _lengths(files: list[bytes]) -> bytes:
    return b"".join(len(file).to_bytes(4, "little") + file for file in files)


@pytest.mark.parametrize("data", [_IMAGES.tolist(), _IMAGES.ravel().tolist()], ids=["nested", "flat"])
def test_a_tensor_in_json_is_read(data: list[Any]) -> None:
    asked = parse(_body(_input(data=data), id="q")[0], None, _PLAIN)
    assert (asked.id, asked.binary, asked.top) == ("q", False, 0)
    np.testing.assert_array_equal(asked.images, _IMAGES)


def test_a_tensor_after_the_json_is_read() -> None:
    given_ = _input(data=None, parameters={"binary_data_size": 32})
    asked = parse(*_body(given_, tail=_IMAGES.tobytes(), parameters={"binary_data_output": True}), _PLAIN)
    assert (asked.id, asked.binary) == (None, True)
    np.testing.assert_array_equal(asked.images, _IMAGES)


def test_a_body_that_is_the_tensor_is_read() -> None:
    np.testing.assert_array_equal(parse(_IMAGES.tobytes(), "0", _PLAIN).images, _IMAGES)
    assert parse(b"\x89PNG", "0", _ENCODED).images == [b"\x89PNG"]


def test_image_files_are_read_from_bytes_and_from_base64() -> None:
    tail = _lengths(_FILES)
    sized = _encoded(data=None, parameters={"binary_data_size": len(tail)})
    assert parse(*_body(sized, tail=tail), _ENCODED).images == _FILES
    texts = [base64.b64encode(file).decode() for file in _FILES]
    for data in (texts, [[text] for text in texts]):
        assert parse(_body(_encoded(data=data))[0], None, _ENCODED).images == _FILES


_BROKEN = {
    "no JSON": (b"{", None, _PLAIN, "EOF"),
    "no text": (b"\xff\xfe", None, _PLAIN, "no inference request"),
    "no inputs": (b"{}", None, _PLAIN, "Field required at `inputs`"),
    "two inputs": (*_body(_input(), _input()), _PLAIN, "takes one input"),
    "another name": (*_body(_input(name="image")), _PLAIN, "got `image` FP32"),
    "another datatype": (*_body(_input(datatype="FP16")), _PLAIN, "got `images` FP16"),
    "another shape": (*_body(_input(shape=[2, 2, 2])), _PLAIN, r"takes \[N, 1, 2, 2\], N from 1 to 3"),
    "no image": (*_body(_input(shape=[0, 1, 2, 2], data=[])), _PLAIN, "N from 1 to 3"),
    "too many images": (*_body(_input(shape=[4, 1, 2, 2])), _PLAIN, "N from 1 to 3"),
    "a negative extent": (*_body(_input(shape=[-2, 1, 2, 2])), _PLAIN, "greater than or equal to 0"),
    "too few numbers": (*_body(_input(data=[1.0] * 7)), _PLAIN, "there are 7"),
    "ragged rows": (*_body(_input(data=[[1], [2, 3]])), _PLAIN, "unequal lengths"),
    "words": (*_body(_input(data=["a"] * 8)), _PLAIN, "something else"),
    "an object": (*_body(_input(data={"a": 1})), _PLAIN, "something else"),
    "NaN": (*_body(_input(data=[float("nan")] * 8)), _PLAIN, "NaN"),
    "a number too large": (*_body(_input(data=[1e39] * 8)), _PLAIN, "too large"),
    "NaN as bytes": (np.full(8, np.nan, np.float32).tobytes(), "0", _PLAIN, "NaN"),
    "no data": (*_body(_input(data=None)), _PLAIN, "is not there"),
    "bytes that are not there": (*_body(_input(parameters={"binary_data_size": 32})), _PLAIN, "where there are 0"),
    "bytes of another size": (
        *_body(_input(parameters={"binary_data_size": 4}), tail=b"1234"),
        _PLAIN,
        "takes 32 bytes, and there are 4",
    ),
    "half an image": (b"1234", "0", _PLAIN, "N from 1 to 3"),
    "a header beyond the body": (b"{}", "3", _PLAIN, "is no length"),
    "a header of many digits": (b"{}", "9" * 5000, _PLAIN, "is no length"),
    "a header of letters": (b"{}", "²", _PLAIN, "is no length"),
    "shared memory": (*_body(_input(parameters={"shared_memory_region": "r"})), _PLAIN, "shared memory"),
    "another output": (*_body(_input(), outputs=[{"name": "probabilities"}]), _PLAIN, "one output, `logits`"),
    "classes of nothing": (
        *_body(_input(), outputs=[{"name": "logits", "parameters": {"classification": "all"}}]),
        _PLAIN,
        "no number of classes",
    ),
    "an element beyond the end": (
        *_body(_encoded(data=None, shape=[1, 1], parameters={"binary_data_size": 6}), tail=b"\x09\0\0\0ab"),
        _ENCODED,
        "no BYTES tensor",
    ),
    "an element too many": (
        *_body(_encoded(data=None, shape=[1, 1], parameters={"binary_data_size": 9}), tail=b"\x01\0\0\0a\0\0\0\0"),
        _ENCODED,
        "no BYTES tensor",
    ),
    "no base64": (*_body(_encoded(data=["a!", "", ""])), _ENCODED, "base64"),
    "numbers for files": (*_body(_encoded(data=[1, 2, 3])), _ENCODED, "base64"),
    "a number for files": (*_body(_encoded(data=3)), _ENCODED, "no list of 3"),
    "fewer files": (*_body(_encoded(data=["", ""])), _ENCODED, "no list of 3"),
}


@pytest.mark.parametrize("case", _BROKEN)
def test_what_is_not_understood_is_refused(case: str) -> None:
    body, length, served, match = _BROKEN[case]
    with pytest.raises(RequestError, match=match) as caught:
        parse(body, length, served)
    assert caught.value.status == 400


_LOGITS = np.array([[0.5, -1, 2, 1], [3, 0, 0, -2]], np.float32)


def test_an_answer_in_json_names_its_request() -> None:
    body, headers = render(Asked("q", _IMAGES, False, 0), _LOGITS, _PLAIN)
    output = {"name": "logits", "datatype": "FP32", "shape": [2, 4], "data": _LOGITS.ravel().tolist()}
    assert json.loads(body) == {"model_name": "m", "model_version": "1", "id": "q", "outputs": [output]}
    assert headers == {"Content-Type": "application/json"}


@pytest.mark.parametrize("binary", [True, False])
def test_classes_come_with_their_labels_the_largest_first(binary: bool) -> None:
    body, headers = render(Asked(None, _IMAGES, binary, 2), _LOGITS, _PLAIN)
    wanted = ["2.000000:2:c:d", "1.000000:3:e", "3.000000:0:a", "0.000000:1:b"]
    if not binary:
        assert json.loads(body)["outputs"][0]["data"] == wanted
        return
    length = int(headers["Inference-Header-Content-Length"])
    (output,) = json.loads(body[:length])["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
    assert body[length:] == _lengths([text.encode() for text in wanted])
    assert output["parameters"]["binary_data_size"] == len(body) - length


def test_a_compressed_body_may_not_hide_more_than_is_allowed() -> None:
    assert _expanded(gzip.compress(b"a" * 100), "gzip", 100) == b"a" * 100
    for body, encoding, status in (
        (gzip.compress(bytes(10**7)), "gzip", 413),
        (gzip.compress(b"a" * 100)[:-3], "gzip", 400),
        (gzip.compress(b"a") * 2, "gzip", 400),
        (b"nothing", "deflate", 400),
        (b"nothing", "br", 415),
    ):
        with pytest.raises(RequestError) as caught:
            _expanded(body, encoding, 100)
        assert caught.value.status == status


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_FIELDS = ("name", "datatype", "shape", "data", "parameters")


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from([_PLAIN, _ENCODED]),
    st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=3),
    st.dictionaries(st.sampled_from(("id", "parameters", "outputs", "inputs")), _JSON, max_size=2),
    st.binary(max_size=40),
    st.none() | st.integers(-1, 200).map(str) | st.text(max_size=3),
)
def test_whatever_comes_is_read_or_refused(
    served: Served, inner: dict[str, Any], outer: dict[str, Any], tail: bytes, length: str | None
) -> None:
    one = (_encoded() if served.encoded else _input()) | inner
    body, right = _body(one, tail=tail, **outer) if "inputs" not in outer else (json.dumps(outer).encode(), "7")
    for given_length in (length, right):
        try:
            asked = parse(body, given_length, served)
        except RequestError:
            continue
        assert len(asked.images) in (1, 2, 3)
        render(asked, np.zeros((len(asked.images), 4), np.float32), served)
