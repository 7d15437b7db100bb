"""Whole models: the same outputs, faster or as they were; and what a user does with one."""

import copy
import inspect
import io
from contextlib import contextmanager

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune

from tests.small_models import resnet, vit
from tscnc_hf import sparse_compile
from tscnc_hf.inference import choosing, compiling
from tscnc_hf.inference.chunks import torch_threads
from tscnc_hf.inference.layers import (
    Absorbed,
    SparseConv,
    SparseConvBlock,
    SparseLayer,
    SparseLinear,
    SparseMLP,
    WeightIsRead,
)
from tscnc_hf.inference.report import logits_difference


class Everything(nn.Module):
    """A convolution whose output goes to two places, a layer called twice, a weight that is read, a residual."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
        self.shared, self.act = nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()
        self.unseen, self.unseen_act = nn.Conv2d(32, 32, 1), nn.SiLU()
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.read = nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem(x)
        both = self.shared(x)
        x = self.act(both) + self.shared(x.flip(-1))
        before = self.unseen(x)
        x = self.unseen_act(before) + 0.5 * before
        x = self.grouped(x).mean((2, 3))
        return self.head(x + self.mlp(self.read(x)) + nn.functional.linear(x, self.read.weight))


def thinned(model, zeros=0.95):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
            elif isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight[torch.rand_like(module.weight) < zeros] = 0
    return model.eval()


@pytest.fixture
def always_sparse(monkeypatch):
    """Whatever the clock says: a sparse layer wherever there can be one."""
    monkeypatch.setattr(compiling, "MARGIN", float("inf"))
    monkeypatch.setattr(compiling, "SECONDS", 0.01)
    monkeypatch.setattr("tscnc_hf.inference.choosing.SECONDS", 0.001)
    before = compiling.choose

    def choose(call, alike):
        choice = before(call, alike)
        choice.dense_ms = float("inf")
        return choice

    monkeypatch.setattr(compiling, "choose", choose)
    race = choosing.race

    def slow_apart(calls, kinds, seconds):
        times = race(calls, kinds, seconds, least=1)
        return times | ({"apart": float("inf")} if "apart" in times else {})

    monkeypatch.setattr(choosing, "race", slow_apart)

    def slow_before(calls, kinds, seconds, least, burst):
        times = race(calls, kinds, seconds, least=1)
        return times | ({"before": float("inf")} if len(times) > 1 else {})

    monkeypatch.setattr(compiling, "race", slow_before)


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


@torch.no_grad()
def assert_same(fast, model, x):
    expected, got = logits(model(x)), logits(fast(x))
    assert (got - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


MODELS = {
    "everything": (lambda: thinned(Everything()), 12),
    "vit": (vit, 8),
    "resnet": (resnet, 8),
    "convnext": (lambda: thinned(timm.create_model("convnext_atto", num_classes=10)), 64),
    "mobilenet": (lambda: thinned(timm.create_model("mobilenetv3_small_050", num_classes=10)), 64),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [2, 17])
def test_outputs_are_those_of_the_model(name, batch, always_sparse):
    make, side = MODELS[name]
    model = make()
    before = copy.deepcopy(model.state_dict())
    fast = sparse_compile(model, torch.randn(batch, 3, side, side))
    assert fast.report.sparse_layers and any(isinstance(m, (SparseLayer, SparseMLP)) for m in fast.modules())
    for size in (1, batch, 16):
        assert_same(fast, model, torch.randn(size, 3, side, side))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    if name in ("everything", "resnet"):
        assert_same(fast, model, torch.randn(batch, 3, side + 3, side + 8))


@pytest.fixture(params=[False, True], ids=["one after another", "by each thread"])
def always_in_chunks(request, always_sparse, monkeypatch):
    monkeypatch.setattr(compiling, "_at_a_time", lambda model, example: ((4, request.param),))
    with torch_threads(2):
        yield


@pytest.mark.parametrize("name", MODELS)
def test_a_few_images_at_a_time(name, always_in_chunks):
    make, side = MODELS[name]
    model = make()
    fast = sparse_compile(model, torch.randn(8, 3, side, side))
    assert "Computed 4 images at a time" in fast.report.to_markdown()
    seen = []
    layer = next(module for module in fast.modules() if isinstance(module, SparseLayer))
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    for size, parts in ((11, 3), (4, 1), (1, 1)):
        seen.clear()
        assert_same(fast, model, torch.randn(size, 3, side, side))
        assert len(seen) % parts == 0 and len(seen) >= parts
    hook.remove()
    stream = io.BytesIO()
    torch.save(fast, stream)
    stream.seek(0)
    x = torch.randn(11, 3, side, side)
    for other in (copy.deepcopy(fast), torch.load(stream, weights_only=False)):
        with torch.no_grad():
            next(other.parameters()).zero_()  # of itself, not of what it was copied from
        assert vars(other)["forward"].model is other
        assert_same(fast, model, x)


def test_images_that_see_one_another_stay_together(always_in_chunks):
    class Relative(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return y - y.mean(0)

    model, x = (
        thinned(Relative(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 10)), 0.9),
        torch.randn(8, 3, 8, 8),
    )
    fast = sparse_compile(model, x)
    assert_same(fast, model, x)
    assert fast.report.sparse_layers == 0


def test_a_loss_is_not_put_together_of_parts(always_in_chunks):
    model, x, labels = vit(), torch.randn(11, 3, 8, 8), torch.arange(11) % 3
    fast = sparse_compile(model, {"pixel_values": x[:8]})
    with torch.no_grad():
        one, other = (net(pixel_values=x, labels=labels) for net in (model, fast))
        hidden = fast(pixel_values=x, output_hidden_states=True, return_dict=False)
    assert abs(one.loss - other.loss) < 1e-5 and other.logits.shape == (11, one.logits.shape[1])
    assert all(len(tensor) == 11 for tensor in hidden[1]) and type(hidden) is tuple
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)


def test_chunks_in_torch_compile_and_a_pipeline(always_in_chunks):
    model, x = vit(), torch.randn(11, 3, 8, 8)
    fast = sparse_compile(model, x[:8])
    with torch.no_grad():
        compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
        assert_same(compiled, model, x)
        exported = torch.export.export(fast, (x,)).module()
        assert torch.allclose(exported(x).logits, model(x).logits, atol=1e-5)


def test_activations_are_part_of_the_layer_before(always_sparse, monkeypatch):
    model = thinned(Everything())
    monkeypatch.setattr(compiling, "_is_long", lambda call, layer: isinstance(layer, SparseLinear))
    fast = sparse_compile(model, torch.randn(16, 3, 12, 12))
    assert fast.stem[0].activation == "relu" and isinstance(fast.stem[2], nn.Identity)
    assert isinstance(fast.mlp[0], SparseMLP) and fast.mlp[0].first.activation == "gelu"
    assert isinstance(fast.mlp[3], Absorbed)
    assert isinstance(fast.read, nn.Linear)  # its weight is read beside
    assert isinstance(fast.grouped, nn.Conv2d)
    assert isinstance(fast.shared, SparseConv) and fast.shared.activation == "none"
    assert isinstance(fast.unseen, SparseConv) and fast.unseen.activation == "none"


@pytest.mark.parametrize("activation", [nn.Hardtanh(0, 10), nn.Hardtanh(-10, 10), nn.ReLU()])
def test_an_activation_with_a_cap_stays_where_it_is(activation, always_sparse):
    model = thinned(nn.Sequential(nn.Linear(64, 128), activation, nn.Linear(128, 10)))
    x = torch.randn(16, 64)
    fast = sparse_compile(model, x)
    assert fast.report.sparse_layers
    for scale in (1, 100, 1e4):
        assert_same(fast, model, scale * x)


def test_layers_that_share_a_weight(always_sparse):
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    model[3].weight = model[0].weight
    model = thinned(model, 0.7)
    x = torch.randn(4, 8, 4, 4)
    fast = sparse_compile(model, x)
    assert fast.report.sparse_layers and not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert_same(fast, model, x)


def test_a_dense_model_comes_back_as_it_was():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    fast = sparse_compile(model, torch.randn(4, 3, 8, 8))
    assert [type(module) for module in fast.modules()] == [type(module) for module in model.modules()]
    assert "with 0% zeros nothing is gained" in fast.report.to_markdown()
    assert fast is not model and fast.report.sparse_layers == 0


def test_the_report_lists_each_layer(always_sparse):
    model = thinned(nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 10)), 0.95)
    table = sparse_compile(model, torch.randn(4, 3, 8, 8)).report.to_markdown()
    assert "| `1` | 64 x 192 | 9" in table


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_copies_and_pickles(name, always_sparse):
    make, side = MODELS[name]
    x = torch.randn(2, 3, side, side)
    fast = sparse_compile(make(), x)
    stream = io.BytesIO()
    torch.save(fast, stream)
    stream.seek(0)
    with torch.no_grad():
        for other in (copy.deepcopy(fast), torch.load(stream, weights_only=False)):
            assert torch.equal(logits(other(x)), logits(fast(x)))
            assert other.report.to_markdown() == fast.report.to_markdown()


@pytest.mark.parametrize("batch", [2, 16])
def test_torch_compile_and_export_see_through_it(batch, always_sparse):
    model = thinned(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 64, 32), nn.GELU(), nn.Linear(32, 10)))  # fmt: skip
    x = torch.randn(batch, 3, 8, 8)
    fast = sparse_compile(model, x)
    assert fast.report.sparse_layers == 3
    with torch.no_grad():
        exported = torch.export.export(fast, (x,)).module()
        compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
        for other in (exported, compiled):
            assert_same(other, model, x)


def test_a_pipeline_takes_it(always_sparse, tiny_vit):
    import numpy as np
    from PIL import Image
    from transformers import pipeline

    model, processor = tiny_vit
    thinned(model)
    fast = sparse_compile(model, torch.randn(1, 3, 8, 8))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    answers = [pipeline("image-classification", model=net, image_processor=processor)(image) for net in (model, fast)]
    for one, other in zip(*answers, strict=True):
        assert one["label"] == other["label"] and abs(one["score"] - other["score"]) < 1e-5


def test_arguments_by_name(always_sparse):
    model = vit()
    x = torch.randn(2, 3, 8, 8)
    assert_same(sparse_compile(model, {"pixel_values": x}), model, x)


@pytest.mark.parametrize(
    "model, example, message",
    [
        (lambda: nn.Linear(4, 4), torch.randn(1, 4), "training mode"),
        (lambda: nn.Linear(4, 4).eval().half(), torch.randn(1, 4), "float16.*float\\(\\)"),
        (lambda: nn.Linear(4, 4).eval().bfloat16(), torch.randn(1, 4), "bfloat16.*float\\(\\)"),
        (lambda: nn.Linear(4, 4).eval(), torch.randn(1, 4).double(), "float64.*float\\(\\)"),
        (lambda: nn.Linear(4, 4, device="meta").eval(), torch.randn(1, 4), "is on meta"),
        (lambda: nn.Linear(4, 4).eval(), torch.randn(0, 4), "at least one image"),
        (lambda: nn.Linear(4, 4).eval(), {}, "at least one image"),
    ],
)
def test_what_cannot_be_compiled_is_refused(model, example, message):
    with pytest.raises(ValueError, match=message):
        sparse_compile(model(), example)


def test_a_compiled_model_is_for_inference_only(always_sparse):
    fast = sparse_compile(vit(), torch.randn(2, 3, 8, 8))
    with pytest.raises(RuntimeError, match="training mode"):
        fast.train()(torch.randn(2, 3, 8, 8))
    with pytest.raises(RuntimeError, match="no gradients"):
        fast.eval()(torch.randn(2, 3, 8, 8, requires_grad=True))


def only_kind(monkeypatch, kind):
    choose = compiling.choose

    def chosen(call, alike):
        choice = choose(call, alike)
        choice.kernels = {name: kernel for name, kernel in choice.kernels.items() if name == kind}
        return choice

    monkeypatch.setattr(compiling, "choose", chosen)


@pytest.mark.parametrize("batch, kind", [(2, "pixels"), (16, "images")])
def test_residual_sums_are_part_of_the_layer_before(batch, kind, always_sparse, monkeypatch):
    only_kind(monkeypatch, kind)
    model = thinned(timm.create_model("resnet18", num_classes=10, channels=(8, 16, 24, 32)))
    x = torch.randn(batch, 3, 64, 64)
    fast = sparse_compile(model, x)
    if kind == "pixels":  # a block is one call: both convolutions, and what is added
        first, second, shortcut = fast.layer1[0].conv1, fast.layer1[0].conv2, fast.layer1[0].downsample[0]
        assert set(fast.layer1[0].steps) == {(first, 0, -1), (shortcut, 0, -1), (second, 1, 2)}
        assert fast.layer1[1].steps[1] == (fast.layer1[1].conv2, 1, 0)
        last = second
    else:
        code = fast.layer1[0].code
        assert "residual = downsample_0" in code and "add" not in code and "act2" not in code
        assert "residual = " in fast.layer1[1].code
        last = [module for module in fast.layer1[0].modules() if isinstance(module, SparseConv)][-1]
    assert last.activation == "relu" and model.layer1[0].act2 is not None
    assert_same(fast, model, x)
    assert_same(copy.deepcopy(fast), model, torch.randn(5, 3, 80, 64))
    with torch.no_grad():
        assert_same(torch.compile(fast, backend="aot_eager", fullgraph=True), model, x)
        assert_same(torch.export.export(fast, (x,)).module(), model, x)


class Placed(nn.Module):
    """Sums with what is the same for all images, and with what is larger than a layer's output."""

    def __init__(self):
        super().__init__()
        self.conv, self.lin, self.head = nn.Conv2d(3, 32, 4, 4), nn.Linear(32, 64), nn.Linear(64, 10)
        self.shift, self.pos = nn.Parameter(torch.randn(32, 1, 1)), nn.Parameter(torch.randn(1, 64, 64))
        self.one = nn.Linear(64, 1)

    def forward(self, x, *more):
        x = (self.conv(x) + self.shift).flatten(2).transpose(1, 2)
        x = (self.lin(x) + self.pos).relu()
        return self.head((self.one(x) + x).mean(1))


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Placed()

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_sum_with_something_of_another_shape(batch, always_sparse):
    model = thinned(Around())
    fast = sparse_compile(model, torch.randn(batch, 3, 32, 32))
    assert any(isinstance(module, SparseLayer) for module in fast.modules())
    for images in (1, 3, 4, 16):
        assert_same(fast, model, torch.randn(images, 3, 32, 32))


def test_a_layer_with_a_hook_stays_and_calls_it(always_sparse):
    model, seen = thinned(Around()), []
    model.inner.lin.register_forward_hook(lambda module, args, output: seen.append(1) or 2 * output)
    x = torch.randn(2, 3, 32, 32)
    fast = sparse_compile(model, x)
    seen.clear()
    assert_same(fast, model, x)
    assert len(seen) == 2


def test_a_weight_that_torch_prunes_in_each_call_is_named():
    model = Around().eval()
    prune.l1_unstructured(model.inner.lin, "weight", 0.9)
    with pytest.raises(ValueError, match="inner.lin.weight is computed anew .*prune.remove"):
        sparse_compile(model, torch.randn(2, 3, 32, 32))


def test_two_convolutions_of_a_block_are_one_call(always_sparse, monkeypatch):
    model = thinned(timm.create_model("resnet18", num_classes=10, channels=(8, 16, 24, 32)))
    x = torch.randn(16, 3, 64, 64)
    only_kind(monkeypatch, "images")
    fast = sparse_compile(model, x)
    block = fast.layer2[0]
    assert isinstance(block.conv1, SparseConvBlock) and isinstance(block.conv2, Absorbed)
    assert block.conv1.first.activation == block.conv1.second.activation == "relu" and "conv2" not in block.code
    for size in (1, 16, 33):
        assert_same(fast, model, torch.randn(size, 3, 64, 64))
    assert_same(copy.deepcopy(fast), model, torch.randn(5, 3, 80, 64))
    with torch.no_grad():
        assert_same(torch.compile(fast, backend="aot_eager", fullgraph=True), model, x)


@pytest.fixture
def every_layer(always_sparse, monkeypatch):
    """Each that can be is sparse, by the kernels for few images."""
    before = compiling._plans
    monkeypatch.setattr(compiling, "_plans", lambda choices: dict(list(before(choices).items())[:1]))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.act, self.fc2 = nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)

    def forward(self, tokens):
        return tokens + self.fc2(self.act(self.fc1(self.norm(tokens))))

    def hidden(self, tokens):
        return self.fc1(self.norm(tokens))


class ConvBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.act, self.conv2 = nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, images):
        return self.conv2(self.act(self.conv1(images))) + images


class Blocks(nn.Module):
    """A block of convolutions and one of tokens, called in turn as `how` says."""

    def __init__(self, how="by place"):
        super().__init__()
        self.how, self.stem, self.first, self.second = how, nn.Conv2d(3, 32, 1), ConvBlock(), Block()
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem(x)
        x = self.first(images=x) if self.how == "by name" else self.first(x)
        x = x.flatten(2).transpose(1, 2)
        x = self.second(tokens=x) if self.how == "by name" else self.second(x)
        if self.how == "another method":
            x = x + self.second.hidden(x).mean(-1, keepdim=True)
        return self.head(x.mean(1)) * (2 if self.how == "attribute" and self.first.act.inplace else 1)


WATCHED = ["first", "first.act", "first.conv1", "second", "second.norm", "second.act", "second.fc2"]


@pytest.mark.parametrize("name", WATCHED)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_whatever_has_a_hook_stays_and_calls_it(name, kind, every_layer):
    model, seen = thinned(Blocks(), 0.8), []

    def hook(module, *args):
        seen.append(name)
        return None if kind != "forward" else args[-1].clamp(max=0.5)  # of which the example shows little

    getattr(model.get_submodule(name), f"register_{kind}_hook")(hook)
    fast = sparse_compile(model, 1e-3 * torch.randn(2, 3, 8, 8))
    assert fast.report.sparse_layers and type(fast.get_submodule(name)) is type(model.get_submodule(name))
    seen.clear()
    assert_same(fast, model, 5 * torch.randn(2, 3, 8, 8))
    assert seen == ([] if kind == "full_backward" else [name] * 2)


def test_a_forward_of_somebodys_own_stays(every_layer):
    model = thinned(Blocks(), 0.8)
    model.second.forward = lambda tokens: Block.forward(model.second, tokens).clamp(max=0.5)
    fast = sparse_compile(model, 1e-3 * torch.randn(2, 3, 8, 8))
    assert_same(fast, model, 5 * torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("how", ["by name", "another method", "attribute"])
def test_blocks_are_called_as_the_model_calls_them(how, every_layer):
    model, x = thinned(Blocks(how), 0.8), torch.randn(2, 3, 8, 8)
    fast = sparse_compile(model, x)
    assert fast.report.sparse_layers == 6
    assert_same(fast, model, torch.randn(3, 3, 8, 8))
    assert ("does not bear it" in fast.report.said) == (how != "by name")
    if how == "by name":
        assert type(fast.first).__name__ == "SparseChain"
        with pytest.raises(TypeError, match="one argument, images"):
            fast.first(pixels=torch.randn(1, 32, 8, 8))


def test_a_block_with_an_argument_that_is_none(every_layer):
    model = timm.create_model(
        "beit_base_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=10
    )
    model, x = thinned(model, 0.8), torch.randn(2, 3, 16, 16)
    assert_same(sparse_compile(model, x), model, x)


def test_errors_of_the_model_itself_surface(always_sparse):
    class Wrong(Around):
        def forward(self, x):
            raise LookupError("of mine")

    with pytest.raises(LookupError, match="of mine"):
        sparse_compile(Wrong().eval(), torch.randn(2, 3, 32, 32))


class ReadTwice(nn.Module):
    """What comes out of a convolution is read by a module, and elsewhere: always, or of several images."""

    def __init__(self, always):
        super().__init__()
        self.stem, self.conv = (nn.Conv2d(n, 16, 3, padding=1, bias=False) for n in (3, 16))
        self.act, self.head, self.always = nn.ReLU(), nn.Linear(16, 10, bias=False), always

    def forward(self, x):
        both = self.conv(self.stem(x))
        more = both.tanh() if self.always or len(x) > 1 else 0
        return self.head((self.act(both) + more).mean((2, 3)))


@pytest.mark.parametrize("always, batch", [(True, 2), (False, 1)])
def test_an_example_that_says_nothing(always, batch, every_layer):
    model = thinned(ReadTwice(always), 0.6)
    fast = sparse_compile(model, torch.zeros(batch, 3, 8, 8))
    assert isinstance(fast.conv, SparseConv) and fast.conv.activation == "none"
    for images in (1, 3):
        assert_same(fast, model, torch.randn(images, 3, 8, 8))


def test_images_that_see_one_another_where_the_example_says_nothing(always_in_chunks):
    class Relative(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return y - y.mean(0)

    model = thinned(Relative(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 10)), 0.9)
    assert_same(sparse_compile(model, torch.zeros(8, 3, 8, 8)), model, torch.randn(8, 3, 8, 8))


class SumOfOne(nn.Module):
    """A layer's output is the same for all images, and the images are added to it."""

    def __init__(self):
        super().__init__()
        self.pos, self.lin, self.head = nn.Parameter(torch.randn(1, 64, 3)), nn.Linear(3, 32), nn.Linear(32, 10)
        self.patch = nn.Conv2d(3, 32, 1)

    def forward(self, x):
        return self.head(self.lin(self.pos) + self.patch(x).flatten(2).transpose(1, 2)).mean(1)


def test_one_image_where_several_are_another_shape(every_layer):
    model = thinned(nn.Sequential(SumOfOne()), 0.6)
    fast = sparse_compile(model, torch.randn(1, 3, 8, 8))
    assert fast.report.sparse_layers
    for images in (1, 4):
        assert_same(fast, model, torch.randn(images, 3, 8, 8))


class Masked(nn.Sequential):
    def forward(self, x):
        return torch.cat([super().forward(x), x.new_full((len(x), 1), float("-inf"))], dim=1)


def small(outputs=10, kind=nn.Sequential):
    return thinned(kind(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, outputs)), 0.9)


def test_logits_without_a_range(always_sparse):
    for model in (small(1), small(kind=Masked)):
        fast = sparse_compile(model, torch.randn(1, 3, 8, 8))
        assert fast.report.sparse_layers and fast.report.difference < 1e-4


@pytest.mark.parametrize(
    "logits, expected, difference",
    [
        ([[2.0]], [[2.1]], 0.1 / 2.1),
        ([[1.0, -1.0]], [[1.0, -1.5]], 0.5 / 2.5),
        ([[1.0, -torch.inf]], [[1.0, -torch.inf]], 0.0),
        ([[1.0, torch.inf]], [[1.0, -torch.inf]], torch.inf),
        ([[1.0, torch.nan]], [[1.0, -torch.inf]], torch.inf),
        ([[torch.nan, 1.0]], [[2.0, 1.0]], torch.inf),
        ([[1.0, 2.0]], [[1.0, torch.inf]], torch.inf),
        ([[1.0]], [[1.0, 2.0]], torch.inf),
    ],
)
def test_differences_of_logits(logits, expected, difference):
    assert logits_difference(torch.tensor(logits), torch.tensor(expected)) == pytest.approx(difference)


def test_a_model_whose_logits_are_not_numbers_is_named(always_sparse):
    model = small()
    with torch.no_grad():
        model[3].bias[0] = torch.nan
    with pytest.raises(ValueError, match="own logits of the example are not numbers"):
        sparse_compile(model, torch.randn(2, 3, 8, 8))


@contextmanager
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "state", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), float64_by_default]
)
def test_the_callers_states_do_not_matter(state, every_layer):
    model, x = thinned(Blocks(), 0.8), torch.randn(2, 3, 8, 8)
    with state():
        fast = sparse_compile(model, x.clone())
    assert fast.report.sparse_layers and isinstance(fast.second.fc1, (SparseLinear, SparseMLP))
    assert not any(tensor.is_inference() for tensor in fast.state_dict().values())
    assert_same(fast, model, x)


def test_the_callers_random_numbers_stay(always_sparse):
    model, x = thinned(Blocks(), 0.8), torch.randn(17, 3, 8, 8)
    before = torch.get_rng_state()
    sparse_compile(model, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_forward_mode_derivatives_are_refused(every_layer):
    x = torch.randn(2, 3, 8, 8)
    for model in (small(), thinned(Blocks(), 0.8)):
        fast = sparse_compile(model, x)
        with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
            torch.func.jvp(fast, (x,), (x,))


class TwoArguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 10)

    def forward(self, pixel_values, extra):
        return self.head(self.norm(self.conv(pixel_values)).mean((2, 3))) + extra


def test_a_model_that_needs_two_arguments(every_layer):
    model, given = thinned(TwoArguments(), 0.7), {"extra": torch.randn(2, 10), "pixel_values": torch.randn(2, 3, 8, 8)}
    fast = sparse_compile(model, given)
    assert not isinstance(fast.norm, nn.BatchNorm2d)
    with torch.no_grad():
        assert torch.allclose(fast(**given), model(**given), atol=1e-5)


def test_a_copy_is_in_evaluation_mode_and_can_be_compiled(every_layer):
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten()]
    model, x = thinned(nn.Sequential(*layers, nn.Linear(64 * 6 * 6, 10)), 0.8), torch.randn(2, 3, 8, 8)
    fast = sparse_compile(model, x)
    assert not any(module.training for module in fast.modules())
    assert_same(sparse_compile(fast, x), model, x)


def test_a_copy_is_not_saved_as_a_model(always_sparse, tmp_path):
    fast = sparse_compile(vit(), torch.randn(2, 3, 8, 8))
    for net in (fast, copy.deepcopy(fast)):
        with pytest.raises(ValueError, match="save_pretrained of a copy by sparse_compile.*compiled from"):
            net.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_left_as_it_was_is_saved_and_its_times_are_of_the_example(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "SECONDS", 0.01)
    monkeypatch.setattr(compiling, "race", lambda calls, *rest, **named: {name: name != "before" for name in calls})
    shapes = []
    row = compiling._row
    monkeypatch.setattr(
        compiling, "_row", lambda choice, *rest: shapes.append(choice.call.shape) or row(choice, *rest)
    )
    fast = sparse_compile(vit(), torch.randn(64, 3, 8, 8))
    assert "Left as it was" in fast.report.said and shapes and {shape[0] for shape in shapes} == {64}
    fast.save_pretrained(tmp_path)
    assert type(fast).from_pretrained(tmp_path).config.hidden_size == 32


def test_who_asks_for_a_weight(every_layer):
    fast = sparse_compile(thinned(Blocks(), 0.8), torch.randn(2, 3, 8, 8))
    packed = [module for module in fast.modules() if isinstance(module, (SparseLayer, SparseMLP))]
    assert packed and not any(hasattr(module, "weight") for module in packed)
    with pytest.raises(WeightIsRead, match="has no dense weight; take it from the uncompiled model"):
        packed[0].weight  # noqa: B018


def test_a_copy_takes_no_state(every_layer):
    fast = sparse_compile(thinned(Blocks(), 0.8), torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="takes no state.*Load that of the model into the model"):
        fast.load_state_dict(fast.state_dict())
