"""The header reader against the safetensors library, and against whatever bytes there are."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save, save_file

from patchkit.errors import BadInput, NotFound, PatchkitError
from patchkit.tensors import DTYPE_BITS, header_of, header_of_file, read_header, to_bytes

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.ones(4, dtype=torch.bfloat16),
    "é": torch.zeros(0, 5),
    "scalar": torch.tensor(3, dtype=torch.int64),
}


def spelled(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int = 0, end: int = 4, dtype: Any = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": [start, end],
    }


def test_ranges_are_where_the_library_put_the_bytes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "file", {"format": "pt"})
    data = (tmp_path / "file").read_bytes()
    found = header_of_file(tmp_path / "file")
    assert found == header_of(data, "file") == read_header(io.BytesIO(data), len(data), "file")
    assert found.metadata == {"format": "pt"}
    assert found.size == len(data)
    for name, tensor in TENSORS.items():
        info = found.tensors[name]
        assert info.shape == tuple(tensor.shape)
        assert (
            data[info.start : info.end] == tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
        assert info.size == info.end - info.start


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).filter(str.isprintable),
        st.tuples(st.sampled_from(["F32", "BF16", "I64", "U8"]), st.lists(st.integers(0, 3), max_size=3)),
        max_size=4,
    ),
    st.none() | st.text(st.characters(codec="utf-8"), max_size=20),
)
def test_files_are_spelled_as_the_library_spells_them(
    shapes: dict[str, tuple[str, list[int]]], note: str | None
) -> None:
    """Byte for byte: a patch's id does not depend on which of the two wrote the file."""
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}
    tensors = {
        name: torch.arange(math.prod(shape), dtype=dtypes[dtype]).reshape(shape)
        for name, (dtype, shape) in shapes.items()
        if name != "__metadata__"
    }
    metadata = None if note is None else {"patchkit": note}
    ours = to_bytes(
        {
            name: (shapes[name][0], tuple(t.shape), t.flatten().view(torch.uint8).numpy().tobytes())
            for name, t in tensors.items()
        },
        metadata or {},
    )
    assert ours == save(tensors, metadata)
    assert {name: tuple(t.shape) for name, t in load(ours).items()} == {
        name: info.shape for name, info in header_of(ours, "x").tensors.items()
    }


def test_two_metadata_keys_have_no_one_spelling() -> None:
    with pytest.raises(ValueError, match="one spelling"):
        to_bytes({}, {"a": "", "b": ""})


BAD = {
    "empty": (b"", "too short"),
    "only a length": ((5).to_bytes(8, "little"), "claims 5 bytes"),
    "an oversized header": ((2**63).to_bytes(8, "little") + b"{}", "claims"),
    "a header past the end": ((3).to_bytes(8, "little") + b"{}", "claims 3"),
    "not JSON": (spelled(b"{oops"), "not JSON"),
    "not UTF-8": (spelled(b'{"\xff": 1}'), "not JSON"),
    "an array": (spelled(b"[]"), "no header"),
    "nothing": (spelled(b""), "no header"),
    "deep": (spelled(b'{"a":' * 5000 + b"1" + b"}" * 5000), "not JSON"),
    "a huge integer": (spelled(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
    "a doubled name": (
        spelled(
            b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}", b"1234"
        ),
        "twice",
    ),
    "a doubled field": (
        spelled(b'{"a":{"dtype":"U8","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
        "twice",
    ),
    "metadata that is not text": (spelled({"__metadata__": {"a": 1}}), "metadata"),
    "metadata that is no table": (spelled({"__metadata__": None}), "metadata"),
    "a nameless tensor": (spelled({"": entry()}, b"1234"), "name"),
    "a name with an escape sequence": (spelled({"\x1b[31m": entry()}, b"1234"), "name"),
    "an over-long name": (spelled({"n" * 2000: entry()}, b"1234"), "name"),
    "a tensor that is no table": (spelled({"a": 3}), "exactly"),
    "a field too many": (spelled({"a": {**entry(), "more": 1}}, b"1234"), "exactly"),
    "an unknown dtype": (spelled({"a": entry(dtype="F33")}, b"1234"), "unknown dtype"),
    "a dtype that is no text": (spelled({"a": entry(dtype=["F32"])}, b"1234"), "unknown dtype"),
    "a negative side": (spelled({"a": entry(shape=(-1, -1))}, b"1234"), "shape"),
    "a side that is true": (spelled({"a": entry(shape=(True,))}, b"1234"), "shape"),
    "a side that is 1.0": (spelled({"a": entry(shape=(1.0,))}, b"1234"), "shape"),
    "a shape that is no list": (spelled({"a": entry(shape="1")}, b"1234"), "shape"),
    "too many sides": (spelled({"a": entry(shape=(1,) * 17)}, b"1234"), "shape"),
    "a product past 64 bits": (spelled({"a": entry(shape=(2**40, 2**40))}, b"1234"), "not what"),
    "offsets backwards": (spelled({"a": entry(4, 0)}, b"1234"), "not what"),
    "three offsets": (spelled({"a": {**entry(), "data_offsets": [0, 4, 4]}}, b"1234"), "two counts"),
    "offsets past the end": (spelled({"a": entry(0, 8, shape=(2,))}, b"1234"), "cut short"),
    "a gap before": (spelled({"a": entry(4, 8)}, b"12345678"), "gap"),
    "an overlap": (spelled({"a": entry(0, 8, shape=(2,)), "b": entry(4, 8)}, b"12345678"), "overlaps"),
    "bytes of nobody": (spelled({"a": entry()}, b"12345678"), "no tensor claims"),
    "a shape for another size": (spelled({"a": entry(0, 4, shape=(2,))}, b"1234"), "not what"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_cannot_be_believed_is_one_line(case: str) -> None:
    data, reason = BAD[case]
    with pytest.raises(BadInput, match=reason) as caught:
        header_of(data, "model.safetensors")
    assert str(caught.value).startswith("model.safetensors: ")
    assert str(caught.value).isprintable()


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="absent"):
        header_of_file(tmp_path / "absent")
    with pytest.raises(BadInput, match="folder"):
        header_of_file(tmp_path)


def accepted_by_the_library(data: bytes) -> bool:
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return False
    return True


def check_any_bytes(data: bytes) -> None:
    """Nothing but a `PatchkitError` of one line; and no file that the library would refuse."""
    refused = ""
    try:
        found = header_of(data, "x")
    except PatchkitError as error:
        refused = str(error)
    assert refused.isprintable()
    if refused:
        return
    assert found.size == len(data)
    assert sum(info.size for info in found.tensors.values()) == len(data) - found.data_start
    assert accepted_by_the_library(data)


@settings(max_examples=300)
@given(st.binary(max_size=60))
@example(spelled({}))
def test_fuzz_bytes(data: bytes) -> None:
    check_any_bytes(data)


VALID = save({"a": torch.ones(2, 2), "b": torch.ones(3, dtype=torch.float16)}, {"format": "pt"})


@settings(max_examples=400)
@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4), st.integers(0, 9)
)
def test_fuzz_a_real_file(changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(VALID)
    for place, value in changes:
        data[place] = value
    check_any_bytes(bytes(data[: len(data) - cut]))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 20) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
likely_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(sorted(DTYPE_BITS)) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 24), min_size=2, max_size=2) | json_values,
        "more": json_values,
    },
)


@settings(max_examples=400)
@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), likely_entries | json_values, max_size=3),
    st.integers(0, 24),
)
def test_fuzz_headers(header: dict[str, Any], size: int) -> None:
    check_any_bytes(spelled(header, bytes(size)))
