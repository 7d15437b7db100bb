"""Gates: their distribution against the closed form, exactness of closing and folding, and where they stand."""

import copy
import json
import math

import pytest
import timm
import torch
from torch import nn

from tscnc_hf.method.units.gates import (
    HardConcreteGate,
    attach_gates,
    clamp_gates_,
    fold_gates_,
    folded_gates,
    gate_parameters,
    gate_report,
    gate_sparse_constraint,
    gated_layers,
    sample_gates,
)
from tscnc_hf.method.units.sites import gate_sites


def timm_vit():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=4, num_classes=5
    )


def timm_resnet():
    return timm.create_model("resnet18", channels=[8, 8, 8, 8], layers=[1, 1, 1, 1], num_classes=5)


def plain_cnn():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )


MODELS = {"vit": timm_vit, "resnet": timm_resnet, "cnn": plain_cnn}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def with_random_gates(kind: str) -> nn.Module:
    """A model whose gates are partly closed, partly open and partly between, with batch-norm statistics of its own."""
    model = MODELS[kind]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    attach_gates(model)
    for parameter in gate_parameters(model):
        nn.init.normal_(parameter, std=3)
        parameter.data[0], parameter.data[1] = -4.0, 4.0
    return model


@pytest.mark.parametrize("log_alpha", [-4.0, -1.0, 0.0, 0.8473, 3.0])
def test_open_gates_follow_the_closed_form(log_alpha):
    gate = HardConcreteGate(10_000).train()
    nn.init.constant_(gate.log_alpha, log_alpha)
    # Louizos et al. 2018, eq. 12, in plain floats
    expected = 1 / (1 + math.exp(-(log_alpha - 2 / 3 * math.log(0.1 / 1.1))))
    torch.testing.assert_close(gate.open_probability(), torch.full((10_000,), expected), rtol=1e-5, atol=1e-7)
    gate.noise.uniform_(generator=torch.Generator().manual_seed(1))
    opened = (gate() > 0).sum().item()
    assert abs(opened - 10_000 * expected) < 3 * math.sqrt(10_000 * expected * (1 - expected))
    assert 0 <= gate().min() and gate().max() <= 1


def test_initial_values_follow_the_drop_rate():
    gate = HardConcreteGate(10_000, drop_rate=0.3, generator=torch.Generator().manual_seed(0))
    assert gate.log_alpha.mean().item() == pytest.approx(math.log(0.7 / 0.3), abs=1e-3)
    assert gate.log_alpha.std().item() == pytest.approx(0.01, rel=0.1)
    with pytest.raises(ValueError, match=r"drop_rate=1 is outside \(0, 1\)"):
        HardConcreteGate(3, drop_rate=1)


def test_gradient_agrees_with_finite_differences():
    gate = HardConcreteGate(50).train()
    nn.init.normal_(gate.log_alpha)
    values, step = gate.sampled(), 1e-3
    (gradient,) = torch.autograd.grad(values.sum(), gate.log_alpha)
    inside = (values > 1e-3) & (values < 1 - 1e-3)
    assert inside.sum() > 10
    with torch.no_grad():
        gate.log_alpha += step
        above = gate.sampled()
        gate.log_alpha -= 2 * step
        below = gate.sampled()
    torch.testing.assert_close(gradient[inside], ((above - below) / (2 * step))[inside], rtol=1e-2, atol=1e-3)


def test_deterministic_value_closes_and_opens_exactly():
    gate = HardConcreteGate(3).eval()
    with torch.no_grad():
        gate.log_alpha.copy_(torch.tensor([-3.0, 0.0, 4.0]))
    torch.testing.assert_close(gate(), torch.tensor([0.0, 0.5, 1.0]))
    assert gate()[0] == 0


@pytest.mark.parametrize("kind", MODELS)
def test_folding_keeps_the_logits(kind):
    model = with_random_gates(kind).eval()
    x = torch.rand(4, 3, 8, 8)
    before, plain_names = model(x), MODELS[kind]().state_dict().keys()
    assert gate_report(model).closed > 0
    state = copy.deepcopy(model.state_dict())
    with folded_gates(model):
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)
        assert model.state_dict().keys() == plain_names
        with folded_gates(model):
            torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), before)
    fold_gates_(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)
    assert model.state_dict().keys() == plain_names and not gated_layers(model)


def test_a_fold_is_undone_after_an_error():
    model = with_random_gates("vit")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="disk"), folded_gates(model):
        raise RuntimeError("disk")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", MODELS)
def test_a_closed_channel_contributes_exactly_zero(kind):
    """Whatever the layers that make a closed channel do, to the last bit; an open one matters."""
    model = with_random_gates(kind).eval()
    x = torch.rand(4, 3, 8, 8)
    before = model(x)
    closed, opened = [], []
    for site in gate_sites(model):
        values = site.reader.gate.deterministic()
        for maker in site.makers:
            rows = maker.weight.view(-1, site.count, site.channels, *maker.weight.shape[1:])
            closed.append((rows, values == 0))
            opened.append((rows, values > 0))
    for changes, same in ((closed, True), (opened, False)):
        with torch.no_grad():
            for rows, which in changes:
                rows[:, which] += 1.0
            assert torch.equal(model(x), before) is same


def test_one_sample_serves_every_forward_of_a_step():
    model = with_random_gates("vit").train()
    x = torch.rand(2, 3, 8, 8)
    sample_gates(model, torch.Generator().manual_seed(0))
    first = model(x)
    assert torch.equal(model(x), first)  # clean and adversarial images see the same network
    sample_gates(model, torch.Generator().manual_seed(1))
    assert not torch.equal(model(x), first)
    sample_gates(model, torch.Generator().manual_seed(0))
    assert torch.equal(model(x), first)


def test_sampling_does_not_touch_the_global_generator():
    model = with_random_gates("vit")
    state = torch.get_rng_state()
    sample_gates(model, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_sites_of_known_architectures(tiny_vit):
    assert [(site.name, site.count, site.channels, len(site.makers)) for site in gate_sites(timm_vit())[:2]] == [
        ("blocks.0.attn.proj", 4, 4, 1),
        ("blocks.0.mlp.fc2", 64, 1, 1),
    ]
    assert [site.name for site in gate_sites(timm_resnet())] == [f"layer{i}.0.conv2" for i in (1, 2, 3, 4)]
    names = [site.name for site in gate_sites(tiny_vit[0])]
    assert any(name.endswith("attention.o_proj") for name in names) and any(name.endswith("mlp.fc2") for name in names)
    assert [site.name for site in gate_sites(plain_cnn())] == ["3"]  # behind the Flatten channels are no longer apart


@pytest.mark.parametrize(
    "between", [nn.LayerNorm(6), nn.GroupNorm(2, 6, affine=False), nn.Sequential(nn.Linear(6, 6))], ids=repr
)
def test_no_gate_where_something_between_mixes_channels(between):
    assert gate_sites(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    assert not gate_sites(nn.Sequential(nn.Linear(4, 6), between, nn.Linear(6, 2)))


def test_squeeze_excitation_keeps_gates_out():
    names = {site.name for site in gate_sites(timm.create_model("mobilenetv3_small_050"))}
    assert "blocks.1.0.conv_pwl" in names  # plain
    assert "blocks.2.0.conv_pwl" not in names  # squeeze-excitation reads every channel


def test_layers_can_be_named():
    model = timm_resnet()
    sites = attach_gates(model, layers=["layer2.0.conv2", "fc"])
    assert [site.name for site in sites] == ["layer2.0.conv2", "fc"] and list(gated_layers(model)) == [
        "layer2.0.conv2",
        "fc",
    ]
    assert [row.makers_known for row in gate_report(model).rows] == [True, False]


def test_wrong_use_is_refused():
    model = timm_vit()
    with pytest.raises(ValueError, match="gate layer 'fc9' is not in VisionTransformer"):
        attach_gates(model, layers=["fc9"])
    with pytest.raises(ValueError, match="norm1 is a LayerNorm: gates stand before Linear"):
        attach_gates(model, layers=["norm1"])
    with pytest.raises(ValueError, match="no place for gates was found in Linear"):
        attach_gates(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="the model has no gates"):
        gate_sparse_constraint(model)
    attach_gates(model)
    with pytest.raises(ValueError, match="has gates already"):
        attach_gates(model)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)

    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(x)))


def test_no_gate_where_two_layers_have_the_weight_it_would_be_folded_into():
    model = nn.Sequential(Residual(), Residual(), Residual())
    model[1].fc2.weight = model[0].fc2.weight
    with pytest.raises(ValueError, match="0.fc2 can have no gates: 1.fc2 has the same weight"):
        attach_gates(model, layers=["0.fc2"])
    assert not gated_layers(model)
    assert [site.name for site in attach_gates(model)] == ["2.fc2"]
    for parameter in gate_parameters(model):
        nn.init.normal_(parameter, std=3)
    model.eval()
    x = torch.randn(3, 4)
    before = model(x)
    with folded_gates(model):
        torch.testing.assert_close(model(x), before)


def test_makers_may_be_tied_and_a_layer_may_stand_twice():
    """A gate is folded into the reader alone; a reader that is called twice is gated twice, and folded once."""
    model = nn.Sequential(Residual(), Residual())
    model[1].fc1.weight = model[0].fc1.weight
    assert [site.name for site in gate_sites(model)] == ["0.fc2", "1.fc2"]
    model = nn.Sequential(block := Residual(), nn.Tanh(), block)
    assert [site.name for site in attach_gates(model)] == ["0.fc2"]
    nn.init.normal_(block.fc2.gate.log_alpha, std=3)
    model.eval()
    x = torch.randn(3, 4)
    before = model(x)
    fold_gates_(model)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("kind", MODELS)
def test_constraint_follows_its_formula(kind):
    """method.md, section 4, in float64 loops over gates."""
    model = with_random_gates(kind)
    a, l0, l2 = 3.0, 0.01, 0.2
    expected = 0.0
    for site in gate_sites(model):
        log_alpha = site.reader.gate.log_alpha.detach().double()
        for gate in range(site.count):
            first, last = gate * site.channels, (gate + 1) * site.channels
            weights = [site.reader.weight.detach()[:, first:last].flatten()]
            for maker in site.makers:
                inputs = site.count * site.channels
                for block in range(len(maker.weight) // inputs):
                    weights.append(maker.weight.detach()[block * inputs + first : block * inputs + last].flatten())
            w = torch.cat(weights).double()
            cost = (l2 / 2 * w.square() + l0).sum()
            t = cost * torch.sigmoid(log_alpha[gate] - 2 / 3 * math.log(0.1 / 1.1))
            expected += ((a + 1) * t / (a + t)).item()
    value = gate_sparse_constraint(model, a, l0, l2)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    value.backward()
    assert all((parameter.grad > 0).all() for parameter in gate_parameters(model))  # it closes gates


def test_clamping_keeps_gates_able_to_return():
    model = with_random_gates("vit")
    for parameter in gate_parameters(model):
        nn.init.constant_(parameter, -50.0)
    clamp_gates_(model)
    assert all(torch.allclose(p, torch.tensor(-math.log(100))) for p in gate_parameters(model))
    assert gate_report(model).closed == gate_report(model).gates


def test_gates_survive_copying_and_the_state_dict():
    model = with_random_gates("resnet").eval()
    x = torch.rand(2, 3, 8, 8)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        for parameter in gate_parameters(twin):
            parameter.fill_(5.0)
    assert not torch.equal(twin(x), model(x))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))
    assert "layer1.0.conv2.gate.log_alpha" in model.state_dict()


def test_compiled_model_with_gates_is_the_same():
    model = with_random_gates("vit").train()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(compiled(x), model(x))


def test_report_names_what_is_removable():
    model = timm_vit()
    attach_gates(model)
    with torch.no_grad():
        model.blocks[1].attn.proj.gate.log_alpha[2] = -4
    report = gate_report(model)
    row = next(row for row in report.rows if row.name == "blocks.1.attn.proj")
    assert (row.gates, row.closed, row.removable, row.channels, row.makers_known) == (4, 1, (2,), 4, True)
    assert report.closed == 1 and json.loads(json.dumps(report.to_dict()))["closed"] == 1
    assert "`blocks.1.attn.proj` | 4 | 1 |" in report.to_markdown()
    assert gate_report(timm_resnet()).rows == ()
