"""The moving average against its formula in float64 and torch's own averaged model."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tscnc_hf.method.averaging import WeightAverage


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))


def step(model: nn.Module) -> None:
    model.train()
    model(torch.rand(8, 3, 8, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def test_the_average_is_the_sum_that_the_formula_says():
    model = network()
    average = WeightAverage(model, 0.6)
    expected = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
    for index in range(1, 21):
        step(model)
        average.update(model, index)
        decay = min(0.6, (1 + index) / (10 + index))
        for name, tensor in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
    for name, tensor in average.tensors.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert average.tensors["1.num_batches_tracked"] == 20
    assert not torch.equal(average.tensors["1.running_mean"], model[1].running_mean)  # statistics are averaged too


def test_late_in_training_it_is_torchs_averaged_model():
    model = network()
    average, theirs = (
        WeightAverage(model, 0.9),
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    )
    theirs.update_parameters(model)  # the first update of theirs is a copy
    for index in range(1000, 1010):
        step(model)
        average.update(model, index)
        theirs.update_parameters(model)
    for name, tensor in theirs.module.named_parameters():
        torch.testing.assert_close(average.tensors[name], tensor.detach())
    for name in ("running_mean", "running_var"):  # integers theirs averages too, into nonsense
        torch.testing.assert_close(average.tensors[f"1.{name}"], getattr(theirs.module[1], name))


def test_a_swap_is_taken_back_to_the_bit_even_after_an_error():
    model = network()
    average = WeightAverage(model, 0.9)
    step(model)
    average.update(model, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.rand(4, 3, 8, 8)
    twin = network()
    twin.load_state_dict(average.tensors)
    with pytest.raises(RuntimeError, match="inside"), average.swapped(model):
        assert torch.equal(model.eval()(x), twin.eval()(x))
        raise RuntimeError("inside")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    average.copy_to_(model)
    assert torch.equal(model.eval()(x), twin.eval()(x))


def test_what_is_masked_is_zero_in_the_average_too():
    model = network()
    average = WeightAverage(model, 0.9)
    mask = torch.rand(5, 144) > 0.9
    for index in range(1, 4):
        step(model)
        with torch.no_grad():
            model[3].weight.mul_(mask)
        average.update(model, index, {"3.weight": mask})
        average_now = average.tensors["3.weight"]
        assert torch.equal(average_now != 0, mask) and not average_now[~mask].signbit().any()


def test_a_shared_weight_is_averaged_once():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    average = WeightAverage(model, 0.5)
    before = model["a"].weight.detach().clone()
    with torch.no_grad():
        model["a"].weight.add_(1)
    average.update(model, 100)
    torch.testing.assert_close(average.tensors["a.weight"], before + 0.5)
    average.copy_to_(model)
    torch.testing.assert_close(model["b"].weight.detach(), before + 0.5)


def test_a_mask_finds_its_weight_under_the_name_that_it_has_elsewhere():
    """A layer's weight may be a parameter of the model, or an embedding, that comes before it."""
    model = nn.ModuleDict({"words": nn.Embedding(4, 4), "head": nn.Linear(4, 4)})
    model["head"].weight = model["words"].weight
    average, mask = WeightAverage(model, 0.5), torch.rand(4, 4) > 0.5
    average.update(model, 100, {"head.weight": mask})
    assert average.tensors.keys() == {"words.weight", "head.bias"}
    assert torch.equal(average.tensors["words.weight"] != 0, mask)


def test_half_precision_is_refused_before_the_first_step(build, make_trainer):
    model, processor = build("vit")
    trainer = make_trainer((model.to(torch.bfloat16), processor), ema_decay=0.999)
    with pytest.raises(ValueError, match="half precision, in which an average does not move"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_wrong_input():
    for decay in (0, 1, -0.1, 1.5):
        with pytest.raises(ValueError, match="outside"):
            WeightAverage(network(), decay)
    average = WeightAverage(network(), 0.9)
    with pytest.raises(ValueError, match="not the averages of this model: 1 names differ, such as '3.bias'"):
        average.load({name: t for name, t in average.tensors.items() if name != "3.bias"})
