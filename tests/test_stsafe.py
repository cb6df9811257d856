"""The parts of a checkpoint: its file format and its way to write plain values."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from offload.codec import decode, encode
from offload.errors import CheckpointError
from offload.stream import spec_of
from offload.stsafe import FileRecord, HashingReader, Spec, header_of, shard


def test_codec_gives_back_what_it_took() -> None:
    value = {
        "plain": [None, True, 1, -0.0, 1e-310, "ü", 2**70],
        "odd": (float("inf"), float("-inf"), ()),
        3: Counter({4: 2}),
        "$float": "not a tag",
        "tensor": torch.arange(3, dtype=torch.bfloat16),
        "array": np.arange(4, dtype=np.uint32),
        "number": np.float64(0.1),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "nested": {"a": {"b": (1, [2, {"c": 3}])}},
    }
    tensors: dict[str, Tensor] = {}
    back = decode(json.loads(json.dumps(encode(value, "v", tensors), allow_nan=False)), tensors)
    assert torch.equal(back.pop("tensor"), torch.arange(3, dtype=torch.bfloat16))
    array = back.pop("array")
    assert array.dtype == np.uint32
    assert array.tolist() == [0, 1, 2, 3]
    del value["tensor"], value["array"]
    assert back == value
    assert type(back[3]) is Counter
    assert np.isnan(decode(encode(float("nan"), "v", {}), {}))


def test_shards_keep_to_the_limit() -> None:
    specs = [Spec(str(i), torch.float32, (n,)) for i, n in enumerate((10, 5, 30, 1, 9, 10))]
    shards = shard(specs, 80)
    assert [[s.name for s in part] for part in shards] == [["0", "1"], ["2"], ["3", "4", "5"]]
    assert shard([], 80) == []


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[-2,-1],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with (
        HashingReader(path, FileRecord(path.stat().st_size, "")) as reader,
        pytest.raises(CheckpointError, match=r"x\.safetensors"),
    ):
        reader.read_header()


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, dtype=torch.bool), "b": torch.rand(2, 2), "c": torch.empty(0, 4)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with HashingReader(path, FileRecord(path.stat().st_size, "")) as reader:
        for spec in reader.read_header():
            raw = bytearray(reader.read(spec.size_bytes))
            if raw:
                found = torch.frombuffer(raw, dtype=spec.dtype).view(spec.shape)
                assert torch.equal(found, tensors[spec.name])


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    specs = shard(
        [
            Spec("flag", torch.bool, (3,)),
            Spec("ü", torch.bfloat16, ()),
            Spec("w", torch.float64, (2,)),
        ],
        1 << 20,
    )[0]
    path = tmp_path / "x.safetensors"
    path.write_bytes(header_of(specs) + b"\0\0\0\0\0\0\xf0\x3f" * 2 + b"\x80\x3f" + b"\1\0\1")
    found = load_file(path)
    assert found["w"].tolist() == [1.0, 1.0]
    assert found["ü"].item() == 1.0
    assert found["flag"].tolist() == [True, False, True]
    assert len(header_of(specs)) % 64 == 0


@pytest.mark.parametrize(
    "tensor", [torch.empty(3, device="meta"), torch.eye(3).to_sparse()], ids=["meta", "sparse"]
)
def test_tensors_without_memory_are_named(tensor: Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"layer\.weight is a Tensor without plain memory"):
        spec_of("layer.weight", tensor)


def test_dtypes_without_a_name_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"layer has dtype torch\.complex128"):
        header_of([Spec("layer", torch.complex128, (1,))])
