import hashlib
import json
import math
import random
import struct

import numpy as np
import pytest
import torch
import zstandard

from tscnc_hf.artifact.files.tensor_file import tensors_digest
from tscnc_hf.artifact.packed import file as sparse_file
from tscnc_hf.artifact.packed.file import (
    GAPS,
    SPARSE_FILE,
    pack_tensors,
    read_sparse_file,
    unpack_tensors,
    write_sparse_file,
)
from tscnc_hf.artifact.packed.index import header_text


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(INTEGERS[tensor.element_size()])


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def sparse(*shape: int, density: float = 0.05, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) < density
    return (torch.randn(shape, generator=generator) * kept).abs().to(dtype)


def at(positions: list[int], numel: int, value: float = 1.5) -> torch.Tensor:
    tensor = torch.zeros(numel)
    tensor[positions] = value
    return tensor


def numpy_reader(path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Written from packed_format.md alone: name -> (dtype, shape, raw dense bytes)."""
    width = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8", "I64": "int64"}
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    meta = header.pop("__metadata__")
    assert (meta["format"], meta["version"]) == ("tscnc_sparse", "2")
    stored = {}
    sha = hashlib.sha256("".join(meta[key] + "\n" for key in ("format", "version", "index", "config")).encode())
    for name in sorted(header):
        entry = header[name]
        raw = body[slice(*entry["data_offsets"])]
        stored[name] = (names[entry["dtype"]], tuple(entry["shape"]), raw)
        line = json.dumps([name, names[entry["dtype"]], entry["shape"]], separators=(",", ":"))
        sha.update(line.encode() + b"\n" + raw)
    assert sha.hexdigest() == meta["sha256"]
    for name, entry in json.loads(meta["index"]).items():
        values, gaps, kind = stored.pop(name)[2], stored.pop(name + ".tscnc_gaps")[2], entry["dtype"]
        narrow, numel = entry.get("value_dtype", kind), math.prod(entry["shape"])
        if entry.get("gaps") == "zstd":
            gaps = zstandard.ZstdDecompressor().decompress(gaps, max_output_size=entry["gap_bytes"])
        if entry.get("values") == "zstd":
            planes = zstandard.ZstdDecompressor().decompress(values, max_output_size=entry["nnz"] * width[narrow])
            values = np.frombuffer(planes, np.uint8).reshape(width[narrow], -1).T.tobytes()
        if narrow != kind and narrow == "bfloat16":  # the upper half of a float32
            values = (np.frombuffer(values, "<u2").astype("<u4") << 16).view("<f4").astype(kind).tobytes()
        elif narrow != kind:
            values = np.frombuffer(values, "<f2").astype(kind).tobytes()
        gaps = np.frombuffer(gaps, np.uint8).astype(np.int64)
        ends = np.cumsum(gaps + (gaps < 255))
        at = ends[gaps < 255] - 1
        assert len(at) == entry["nnz"] and 0 <= numel - (ends[-1] if len(ends) else 0) < 255
        dense = np.zeros((numel, width[kind]), np.uint8)
        dense[at] = np.frombuffer(values, np.uint8).reshape(-1, width[kind])
        stored[name] = (kind, tuple(entry["shape"]), dense.tobytes())
    return stored


def mixture() -> dict[str, torch.Tensor]:
    odd = torch.zeros(900)
    odd[:4] = torch.tensor([-1e-45, float("nan"), float("inf"), -float("inf")])
    odd.view(torch.int32)[700] = 0x7FC12345  # a NaN with a payload
    return {
        "layer.weight": sparse(24, 6, 3, 3),
        "odd": odd,
        "half": sparse(40, 30, dtype=torch.float16, seed=1),
        "brain": sparse(40, 30, dtype=torch.bfloat16, seed=2),
        "far": at([0, 256, 900, 3000], 4000),
        "full": torch.randn(7, 5, generator=torch.Generator().manual_seed(3)),
        "count": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "zéro": torch.zeros(2, 600),
    }


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_round_trip_keeps_every_bit(dtype, tmp_path):
    tensors = {"a": sparse(30, 40, dtype=dtype), "b.weight": sparse(8, 4, 3, 3, density=0.9, dtype=dtype)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    packed, metadata = pack_tensors(tensors)
    assert packed["a"].dtype == dtype and packed["a"].ndim == 1 and packed["a" + GAPS].dtype == torch.uint8
    assert all(type(text) is str for pair in metadata.items() for text in pair)
    assert_same(unpack_tensors(packed, metadata), tensors)
    path = write_sparse_file(tensors, tmp_path / "new" / SPARSE_FILE)
    assert_same(read_sparse_file(path), tensors)
    assert_same(tensors, before)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(0),
        torch.empty(3, 0, 2),
        torch.tensor(0.0),
        torch.tensor(2.5),
        torch.zeros(1),
        torch.zeros(254),
        torch.zeros(255),
        torch.zeros(256),
        torch.zeros(10, 511),
        torch.ones(10, 11),
        torch.full((600,), float("nan")),
    ],
    ids=lambda t: f"{tuple(t.shape)}",
)
def test_edges_round_trip(tensor):
    assert_same(unpack_tensors(*pack_tensors({"t": tensor})), {"t": tensor})


@pytest.mark.parametrize(
    "positions, numel, gaps",
    [
        ([0], 2, [0]),
        ([254], 255, [254]),
        ([255], 256, [255, 0]),  # exactly 255 zeros
        ([256], 257, [255, 1]),
        ([510], 511, [255, 255, 0]),
        ([600], 601, [255, 255, 90]),
        ([0, 256], 600, [0, 255, 0, 255]),  # 343 zeros after the last value
        ([], 254, []),
        ([], 255, [255]),
        ([3], 3 + 1 + 254, [3]),
        ([3], 3 + 1 + 255, [3, 255]),
    ],
)
def test_gap_bytes_are_those_of_the_description(positions, numel, gaps):
    tensor = at(positions, numel)
    packed, metadata = pack_tensors({"t": tensor})
    assert packed["t" + GAPS].tolist() == gaps
    assert_same(unpack_tensors(packed, metadata), {"t": tensor})


def test_negative_zero_nan_and_infinity_are_values():
    odd = mixture()["odd"]
    packed, metadata = pack_tensors({"odd": odd})
    assert json.loads(metadata["index"])["odd"] == {"shape": [900], "dtype": "float32", "nnz": 5}
    back = unpack_tensors(packed, metadata)["odd"]
    assert_same({"odd": back}, {"odd": odd})
    assert math.copysign(1, back[0].item()) == -1 and back.view(torch.int32)[700] == 0x7FC12345


def test_a_tensor_stays_dense_where_packing_does_not_pay():
    dense, other = torch.ones(100), torch.zeros(100, dtype=torch.int64)
    at_limit = torch.cat([torch.ones(80), torch.zeros(20)])  # 80 * 5 bytes are no fewer than 100 * 4
    below = torch.cat([torch.ones(79), torch.zeros(21)])
    packed, metadata = pack_tensors({"dense": dense, "other": other, "limit": at_limit, "below": below})
    assert set(packed) == {"dense", "other", "limit", "below", "below" + GAPS}
    assert list(json.loads(metadata["index"])) == ["below"] and packed["below"].shape == (1, 79)


def test_names_that_collide_keep_the_tensor_dense():
    tensors = {"a": torch.zeros(1000), "a" + GAPS: torch.arange(4, dtype=torch.uint8), "b": torch.zeros(1000)}
    packed, metadata = pack_tensors(tensors)
    assert packed["a"].shape == (1000,) and packed["b"].shape == (1, 0)
    assert_same(unpack_tensors(packed, metadata), tensors)


def test_tied_non_contiguous_and_trainable_tensors(tmp_path):
    weight = torch.nn.Parameter(sparse(40, 50))
    wide = sparse(4, 8, 3, 3).to(memory_format=torch.channels_last)
    ones = torch.ones(12)
    tensors = {
        "one": weight, "two": weight, "turned": weight.t(), "every": weight[:, ::3], "last": wide,
        "same": torch.zeros(1).expand(9, 100), "dense": ones, "tied": ones, "part": ones[3:],
    }  # fmt: skip
    back = read_sparse_file(write_sparse_file(tensors, tmp_path / SPARSE_FILE))
    assert_same(back, {name: tensor.detach() for name, tensor in tensors.items()})
    back["dense"].zero_()
    assert bool((back["tied"] == 1).all()) and bool((ones == 1).all())


def test_other_dtypes_pass_through():
    tensors = {
        "mask": torch.zeros(400) > 1, "bytes": torch.zeros(400, dtype=torch.uint8), "long": torch.zeros(400).long(),
        "float8": torch.zeros(400).to(torch.float8_e4m3fn),
    }  # fmt: skip
    packed, metadata = pack_tensors(tensors)
    assert set(packed) == set(tensors)
    assert_same(unpack_tensors(packed, metadata), tensors)


def test_fuzz_shapes_and_densities():
    rng = random.Random(0)
    packed_at_all = 0
    for case in range(300):
        shape = [rng.choice([1, 2, 3, 5, 17, 33]) for _ in range(rng.randint(0, 4))]
        density = rng.choice([0.0, 0.0005, 0.004, 0.02, 0.1, 0.5, 0.9, 1.0])
        tensor = sparse(*shape, density=density, seed=case, dtype=rng.choice(FLOATS))
        packed, metadata = pack_tensors({"t": tensor})
        packed_at_all += "t" + GAPS in packed
        assert packed["t"].shape == tensor.shape or "t" + GAPS in packed
        assert packed["t"].ndim != tensor.ndim or "t" + GAPS not in packed  # a loader of dense weights must notice
        assert sum(t.nbytes for t in packed.values()) <= tensor.nbytes
        assert_same(unpack_tensors(packed, metadata), {"t": tensor})
    assert 100 < packed_at_all < 300  # both ways were met


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_an_independent_reader_reads_the_same(compression, tmp_path):
    tensors = mixture() | {"large": sparse(300, 200, seed=9), "far.large": at([7, 90_000, 500_000], 600_000)}
    path = write_sparse_file(tensors, tmp_path / SPARSE_FILE, compression=compression)
    assert_same(read_sparse_file(path), tensors)
    found = numpy_reader(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        dtype, shape, raw = found[name]
        assert (f"torch.{dtype}", shape) == (str(tensor.dtype), tuple(tensor.shape))
        assert np.array_equal(np.frombuffer(raw, np.uint8), tensor.reshape(-1).view(torch.uint8).numpy()), name


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("value_dtype, torch_dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_an_independent_reader_reads_rounded_values_the_same(compression, value_dtype, torch_dtype, tmp_path):
    tensors = {"wide": sparse(300, 200, seed=9), "double": sparse(70, 80, dtype=torch.float64), "line": sparse(9000)}
    path = write_sparse_file(tensors, tmp_path / SPARSE_FILE, compression=compression, value_dtype=value_dtype)
    expected = {name: tensor.to(torch_dtype).to(tensor.dtype) for name, tensor in tensors.items()}
    assert_same(read_sparse_file(path), expected)
    for name, (dtype, _, raw) in numpy_reader(path).items():
        assert f"torch.{dtype}" == str(expected[name].dtype)
        assert np.array_equal(np.frombuffer(raw, np.uint8), expected[name].reshape(-1).view(torch.uint8).numpy())


def test_size_at_95_percent(tmp_path):
    weight = sparse(400, 500, density=0.05)
    assert 0.94 < (weight == 0).float().mean() < 0.96
    path = write_sparse_file({"weight": weight}, tmp_path / SPARSE_FILE)
    assert path.stat().st_size < 0.08 * weight.nbytes


def test_the_same_tensors_give_the_same_packing_in_any_order():
    tensors = mixture()
    assert pack_tensors(tensors)[1] == pack_tensors(dict(reversed(tensors.items())))[1]
    changed = {**tensors, "full": tensors["full"] + 1e-3}
    assert pack_tensors(tensors)[1]["sha256"] != pack_tensors(changed)[1]["sha256"]


def test_truncated_files_are_refused(tmp_path):
    path = write_sparse_file(mixture(), tmp_path / SPARSE_FILE)
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 200, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{SPARSE_FILE}.*save it again"):
            read_sparse_file(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=SPARSE_FILE):
        read_sparse_file(path)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_sparse_file(path)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=SPARSE_FILE):
        read_sparse_file(tmp_path / SPARSE_FILE)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_any_changed_byte_is_noticed(compression, tmp_path):
    tensors = mixture() | {"large": sparse(60, 50, seed=9), "dead": torch.cat([torch.zeros(2000), torch.ones(500)])}
    path = write_sparse_file(tensors, tmp_path / SPARSE_FILE, compression=compression)
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = random.Random(0)
    places = [*range(8), header - 1, header, len(whole) - 1]
    places += [rng.randrange(8, header) for _ in range(120)] + [rng.randrange(header, len(whole)) for _ in range(120)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{SPARSE_FILE}.*save it again"):
            read_sparse_file(path)
    assert len(places) * 2 > 500


def test_padding_that_is_not_blank_is_noticed(tmp_path):
    """A line feed there is legal JSON, changes nothing, and would be the one byte that nobody checks."""
    path = write_sparse_file({"w": sparse(30, 40)}, tmp_path / SPARSE_FILE)
    whole = bytearray(path.read_bytes())
    length = struct.unpack("<Q", whole[:8])[0]
    padded = whole[8 : 8 + length].rstrip(b" ") + b" " * 8
    good = struct.pack("<Q", len(padded)) + padded + whole[8 + length :]
    path.write_bytes(good)
    read_sparse_file(path)
    path.write_bytes(good.replace(b"}" + b" " * 8, b"}" + b" " * 7 + b"\n"))
    with pytest.raises(ValueError, match="header is damaged"):
        read_sparse_file(path)


def forged(changes: dict, **replaced: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A packed tensor "t" (shape (600,), values at 3 and 300) with a changed index and a digest that fits."""
    packed, metadata = pack_tensors({"t": at([3, 300], 600)})
    index = json.loads(metadata["index"])
    index["t"].update(changes)
    packed.update({{"values": "t", "gaps": "t" + GAPS}[name]: tensor for name, tensor in replaced.items()})
    metadata["index"] = json.dumps(index)
    header = "".join(metadata[key] + "\n" for key in ("format", "version", "index", "config"))
    return packed, {**metadata, "sha256": tensors_digest(header, packed)}


def test_the_forger_can_make_a_good_file():
    assert_same(unpack_tensors(*forged({})), {"t": at([3, 300], 600)})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shape": [2**40, 2**40]}, "impossible"),  # would overflow
        ({"shape": [10**15]}, "stored bytes can cover"),  # would fill the memory
        ({"shape": [300]}, "cover"),
        ({"shape": [856]}, "cover"),
        ({"shape": [0, 600]}, "impossible"),
        ({"shape": [-600]}, "impossible"),
        ({"shape": [True, 600]}, "impossible"),
        ({"shape": 600}, "impossible"),
        ({"shape": [600.0]}, "impossible"),
        ({"shape": [1] * 65 + [600]}, "impossible"),
        ({"shape": [10**4000, 600]}, "impossible"),
        ({"shape": [600, 1]}, "expected torch.float32"),
        ({"nnz": 3}, "counts 3 values"),
        ({"nnz": "2"}, "impossible"),
        ({"nnz": -1}, "impossible"),
        ({"dtype": "float128"}, "dtype 'float128'"),
        ({"dtype": ["float32"]}, "dtype"),
        ({"dtype": "float64"}, "expected torch.float64"),
        ({"extra": 1}, "must have shape"),
        ({"value_dtype": "float16"}, "expected torch.float16"),
        ({"value_dtype": "float64"}, "no narrower dtype"),
        ({"value_dtype": ["float16"]}, "no narrower dtype"),
        ({"values": "zstd"}, "expected torch.uint8"),
        ({"values": "lzma"}, "may be 'zstd'"),
        ({"gaps": "zstd", "gap_bytes": 3}, "zstd frame"),
        ({"gaps": "zstd", "gap_bytes": 10**12}, "more than shape"),
        ({"gaps": "zstd"}, "impossible"),
        ({"gap_bytes": 3}, "with gap_bytes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_index_that_contradicts_the_tensors_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        unpack_tensors(*forged(changes))


@pytest.mark.parametrize(
    "replaced, message",
    [
        ({"gaps": torch.tensor([3, 255], dtype=torch.uint8)}, "count"),
        ({"gaps": torch.tensor([3, 255, 41, 255, 255], dtype=torch.uint8)}, "cover"),
        ({"gaps": torch.tensor([3, 255, 41], dtype=torch.int16)}, "one-dimensional torch.uint8"),
        ({"values": torch.ones(1, 3)}, "counts 2 values and 3 are stored"),
        ({"values": torch.tensor([[1.0, 0.0]])}, "a zero is stored"),
        ({"values": torch.ones(2)}, r"expected torch.float32 \(1, 2\)"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(replaced, message):
    with pytest.raises(ValueError, match=message):
        unpack_tensors(*forged({}, **replaced))


@pytest.mark.parametrize(
    "key, value", [("format", "pt"), ("version", "1"), ("version", "3"), ("version", ""), ("sha256", "0" * 64)]
)
def test_other_metadata_is_refused(key, value):
    packed, metadata = pack_tensors(mixture())
    said = {"version": f"of version {value!r}; this tscnc_hf reads version '2'. Update", "sha256": "digest"}
    with pytest.raises(ValueError, match=said.get(key, key)):
        unpack_tensors(packed, {**metadata, key: value})


def test_missing_or_further_parts_are_refused():
    packed, metadata = pack_tensors(mixture())
    for changed in ({k: v for k, v in packed.items() if k != "far" + GAPS}, {**packed, "more": torch.ones(1)}):
        with pytest.raises(ValueError, match="digest"):
            unpack_tensors(changed, metadata)
    for wrong in (None, {}, {**metadata, "note": "x"}, {k: v for k, v in metadata.items() if k != "sha256"}):
        with pytest.raises(ValueError, match="metadata"):
            unpack_tensors(packed, wrong)


def test_what_is_no_tensor_is_refused():
    for wrong in ([1.0], torch.empty(3, device="meta"), torch.eye(3).to_sparse()):
        with pytest.raises(ValueError, match="'w' is"):
            pack_tensors({"w": wrong})


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_sparse_file({"w": torch.ones(3)}, tmp_path / SPARSE_FILE)

    def breaks(tensors, name, metadata):
        name.write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(sparse_file, "save_file", breaks)
    with pytest.raises(OSError, match="disk full"):
        write_sparse_file({"w": torch.zeros(3)}, path)
    assert_same(read_sparse_file(path), {"w": torch.ones(3)})
    assert [p.name for p in tmp_path.iterdir()] == [SPARSE_FILE]


def test_others_may_read_the_file_as_any_new_file(tmp_path):
    (tmp_path / "other").touch()
    write_sparse_file({"a": torch.eye(64)}, tmp_path / SPARSE_FILE)
    assert (tmp_path / SPARSE_FILE).stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}])
def test_a_zero_of_either_sign_is_a_zero(dtype, options):
    """`weight * mask`, as torch's own pruning does it, leaves -0.0: a file of it is as small as one of 0.0."""
    plain = sparse(200, 300, density=0.05, dtype=dtype)
    signed = torch.where((plain == 0) & (torch.rand(plain.shape) < 0.5), -plain.new_zeros(()), plain)
    assert signed.signbit().sum() > plain.signbit().sum()
    files = [pack_tensors({"w": tensor}, **options)[0] for tensor in (plain, signed)]
    assert_same(*files)
    back = unpack_tensors(*pack_tensors({"w": signed}, **options))["w"]
    assert torch.equal(back, signed) and torch.equal(back.view(torch.uint8), plain.view(torch.uint8))


def test_denormal_numbers_are_values_also_where_they_are_flushed():
    tiny = torch.zeros(600)
    tiny.view(torch.int32)[5] = 1
    tiny.view(torch.int32)[9] = -(2**31) + 1
    assert torch.set_flush_denormal(True)
    try:
        back = unpack_tensors(*pack_tensors({"w": tiny}))["w"]
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(back.view(torch.int32), tiny.view(torch.int32))


def test_a_file_that_stores_a_minus_zero_is_refused():
    packed, metadata = pack_tensors({"w": at([3, 700], 2000)})
    packed["w"][0, 1] = -0.0
    metadata["sha256"] = tensors_digest(header_text(metadata), packed)
    with pytest.raises(ValueError, match="a zero is stored among the values"):
        unpack_tensors(packed, metadata)
