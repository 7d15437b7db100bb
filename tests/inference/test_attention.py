"""Attention by its own kernel, against float64; what it is not for goes to torch; in models it is found by itself."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

from tscnc_hf import sparse_compile
from tscnc_hf.inference import attention as room
from tscnc_hf.inference.attention import attention
from tscnc_hf.inference.layers import SparseMLP
from tscnc_hf.inference.operators import machine


@pytest.fixture(autouse=True)
def no_gradient():
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch):
    """The calls of the kernel."""
    machine()
    seen = []
    kernel = torch.ops.tscnc.attention.default

    class Ops:
        class attention:
            @staticmethod
            def default(*args):
                seen.append(args[0].shape)
                return kernel(*args)

    monkeypatch.setattr(torch.ops, "tscnc", Ops)
    return seen


def drawn(images, heads, queries, keys, size, scale=1.0):
    """q, k, v as views of what one layer computes: a token's heads side by side."""
    parts = [torch.randn(images, n, heads, size) * scale for n in (queries, keys, keys)]
    return [part.transpose(1, 2) for part in parts]


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 16),
        (2, 3, 65, 65, 64),
        (1, 2, 17, 33, 16),
        (3, 1, 4, 16, 32),
        (1, 2, 5, 79, 48),
        (1, 1, 130, 7, 80),
    ],
)
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_it_is_softmax_in_float64(shape, scale, calls):
    q, k, v = drawn(*shape, scale=scale)
    for factor in (None, 0.3):
        expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=factor)
        rounding = (F.scaled_dot_product_attention(q, k, v, scale=factor) - expected).abs().max()
        for given in ((q, k, v), [x.contiguous() for x in (q, k, v)], [x.mT.contiguous().mT for x in (q, k, v)]):
            found = attention(*given, scale=factor)
            assert found.shape == expected.shape
            assert (found - expected).abs().max() <= 4 * rounding + 1e-6 * expected.abs().max()
    assert len(calls) == 6


def test_one_key_far_above_the_others_takes_it_all():
    q, k, v = torch.full((1, 1, 2, 16), 50.0), torch.zeros(1, 1, 20, 16), torch.randn(1, 1, 20, 16)
    k[0, 0, 19] = 50
    assert torch.equal(attention(q, k, v), v[:, :, 19:].expand(1, 1, 2, 16))
    k[0, 0, 3, 0] = float("nan")
    assert attention(q, k, v).isnan().all()


def test_what_the_kernel_is_not_for_goes_to_torch(calls, monkeypatch):
    q, k, v = drawn(1, 2, 9, 9, 16)
    mask = torch.rand(9, 9) < 0.5
    mask.fill_diagonal_(True)
    options = [{"attn_mask": mask}, {"is_causal": True}]
    for given in options:
        assert torch.equal(attention(q, k, v, **given), F.scaled_dot_product_attention(q, k, v, **given))
    others = [
        drawn(1, 2, 9, 9, 10),
        [x.bfloat16() for x in (q, k, v)],
        [x.double() for x in (q, k, v)],
        (q[0], k[0], v[0]),
    ]
    for scale in (-1.0, -20.0):
        assert torch.equal(attention(q, k, v, scale=scale), F.scaled_dot_product_attention(q, k, v, scale=scale))
    assert attention(q[:0], k[:0], v[:0]).shape == (0, 2, 9, 16)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="forward AD"):  # torch's own has none either, and says so
            attention(dual, k, v)
    others += [(q, k, torch.cat([v, v], dim=-1)), (q, k[:, :1], v[:, :1])]
    for given in others[:-1]:
        assert torch.equal(attention(*given), F.scaled_dot_product_attention(*given))
    assert torch.equal(
        attention(*others[-1], enable_gqa=True), F.scaled_dot_product_attention(*others[-1], enable_gqa=True)
    )
    with torch.enable_grad():
        attention(q.requires_grad_(), k, v).sum().backward()
    assert q.grad is not None
    q = q.detach()
    monkeypatch.setattr(room, "MOST_TOKENS", 8)
    assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert not calls


@pytest.mark.parametrize("batch", [2, 40])
def test_blocks_of_a_vit_compute_it_and_their_sums_in_the_layers(batch, monkeypatch):
    monkeypatch.setattr("tscnc_hf.inference.compiling.MARGIN", float("inf"))
    monkeypatch.setattr("tscnc_hf.inference.compiling.SECONDS", 0.01)
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter[torch.rand_like(parameter) < 0.95] = 0
    x = torch.randn(batch, 3, 32, 32)
    fast = sparse_compile(model, x)
    code = fast.blocks[1].code
    assert (
        "attention_attention(" in code and code.count("residual = ") == 2 and " + " not in code and "norm" not in code
    )
    assert isinstance(fast.blocks[1].mlp.fc1, SparseMLP) or batch == 2
    expected = copy.deepcopy(model).double()(x.double())
    assert (fast(x) - expected).abs().max() < 1e-4 * (expected.max() - expected.min())
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)(x)
    assert (compiled - expected).abs().max() < 1e-4 * (expected.max() - expected.min())
    program = torch.export.export(fast, (x,))
    assert "tscnc.attention" in program.graph_module.code
    assert torch.equal(program.module()(x), fast(x)) or (program.module()(x) - expected).abs().max() < 1e-4
