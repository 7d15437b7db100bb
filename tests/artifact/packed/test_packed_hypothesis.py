"""Round trips of tensors that nobody would think of, and of ones too large to have."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tscnc_hf.artifact.packed.file import GAPS, pack_tensors, unpack_tensors
from tscnc_hf.artifact.packed.gaps import CHUNK, decode_gaps, encode_gaps, measure_gaps
from tscnc_hf.artifact.packed.index import may_claim, read_index


INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16}
INTEGERS[torch.bfloat16] = torch.int16


@st.composite
def tensors(draw):
    """Runs of zeros around the 255 and its multiples, values of any bits at all, in one to four dimensions."""
    dtype = draw(st.sampled_from([*INTEGERS]))
    width = torch.iinfo(INTEGERS[dtype])
    gap = st.one_of(st.integers(0, 3), st.integers(250, 260), st.integers(500, 515), st.integers(0, 3000))
    # -0.0 (a zero), the smallest subnormal, infinity and a quiet and a signalling NaN of float16, bfloat16, float32
    special = [width.min, 1, -1, 0x7C00, 0x7F80, 0x7E01, 0x7C01, 0x7F800000 & width.max, 0x7FC12345 & width.max]
    bits = st.one_of(st.sampled_from([value for value in special if value]), st.integers(width.min, width.max))
    runs = draw(st.lists(st.tuples(gap, bits), max_size=60))
    flat = [number for zeros, value in runs for number in [*[0] * zeros, value]] + [0] * draw(gap)
    first = draw(st.sampled_from([n for n in (1, 2, 3, 5) if len(flat) % n == 0]))
    shapes = [(len(flat),), (first, -1), (1, first, -1), (-1, first, 1, 1)] if flat else [(0,), (3, 0), (0, 4, 2)]
    return torch.tensor(flat, dtype=INTEGERS[dtype]).view(dtype).reshape(draw(st.sampled_from(shapes)))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(tensors(), min_size=1, max_size=2), st.sampled_from([None, "zstd"]))
def test_any_tensors_come_back_bit_for_bit(given_tensors, compression):
    named = {f"t{index}": tensor for index, tensor in enumerate(given_tensors)}
    packed, metadata = pack_tensors(named, compression=compression)
    for name, tensor in named.items():
        if name + GAPS in packed:
            assert packed[name].ndim != tensor.ndim
            assert (
                packed[name].nbytes + packed[name + GAPS].nbytes
                < tensor.nbytes
                <= 2040 * packed[name].nbytes + (2040 * packed[name + GAPS].nbytes + 2032)
            )
    smaller = {name for name in named if name + GAPS in packed}
    found = unpack_tensors(packed, metadata)
    assert found.keys() == named.keys()
    for name, tensor in named.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        bits, expected = (one.view(INTEGERS[tensor.dtype]) for one in (found[name], tensor))
        minus_zero = expected == torch.iinfo(bits.dtype).min
        assert torch.equal(bits[~minus_zero], expected[~minus_zero])
        assert (bits[minus_zero] == (0 if name in smaller else torch.iinfo(bits.dtype).min)).all()


class Recorder:
    """Stands for a dense tensor of any size: keeps what is written, and where."""

    def __init__(self, numel):
        self.numel, self.zeroed, self.written, self.start = numel, 0, {}, 0

    def __getitem__(self, part):
        self.start, stop, _ = part.indices(self.numel)
        self.length = stop - self.start
        return self

    def zero_(self):
        self.zeroed += self.length
        return self

    def index_put_(self, indices, values):
        assert all(0 <= index < self.length for index in indices[0].tolist())
        self.written |= {self.start + int(i): int(v) for i, v in zip(indices[0], values, strict=True)}


def test_more_than_two_to_the_31_elements():
    shape = [3, 2**16, 2**15]  # 6.4e9 elements: 25 GB as float32
    numel = math.prod(shape)
    positions = torch.tensor([0, 2**31 - 1, 2**31, 2**32 + 5, numel - 300])
    gaps = encode_gaps(positions, numel)
    count, covered = measure_gaps(gaps.numpy())
    assert count == 5 and 0 <= numel - covered < 255
    assert len(gaps) > 300 * CHUNK
    values, dense = torch.arange(1, 6), Recorder(numel)
    decode_gaps(gaps.numpy(), lambda start, stop: values[start:stop], dense)
    assert dense.written == dict(zip(positions.tolist(), range(1, 6), strict=True))
    assert dense.zeroed == numel
    entry = read_index('{"w": {"shape": [3, 65536, 32768], "dtype": "float32", "nnz": 5}}')["w"]
    assert (entry.numel, entry.bytes) == (numel, 4 * numel)
    may_claim("w", entry, torch.ones(5), gaps)
