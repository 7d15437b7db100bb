"""The pruner around an optimizer's steps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.method.pruning.test_allocation import ARCHITECTURES
from tscnc_hf.method.averaging import WeightAverage
from tscnc_hf.method.criteria import register_criterion
from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.pruning.allocation import Allocation
from tscnc_hf.method.pruning.pruner import Pruner
from tscnc_hf.method.reports.sparsity import sparsity_report
from tscnc_hf.method.units.gates import attach_gates


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1).to(memory_format=torch.channels_last), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.rand(16, 3, 4, 4, generator=generator)
    return x, (x.mean((1, 2, 3)) * 40).long() % 10


def take_steps(model, pruner, optimizer, steps, sparsities=(), start=0):
    """Steps `start + 1` to `start + steps`; after step k the masks are chosen anew if `sparsities` has k."""
    sparsities = dict(sparsities)
    for step in range(start + 1, start + steps + 1):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        pruner.freeze_others(model)
        pruner.before_step()
        optimizer.step()
        pruner.after_step()
        if step in sparsities:
            pruner.update(sparsities[step])
        pruner.apply_()


def zeros(model) -> int:
    return sum(int((record.weight == 0).sum()) for record in weight_matrices(model))


SIZE = 8 * 27 + 1280


# ---- masks ----


def test_zeros_are_exact_and_weights_return():
    model = nn.Sequential(nn.Linear(20, 10), nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last))
    pruner = Pruner(weight_matrices(model))
    pruner.update(0.8)
    pruner.apply_()
    report = sparsity_report(model)
    assert report.zeros == pruner.pruned_count == round(0.8 * (200 + 108)) == pruner.target_count(0.8)
    assert report.parameter_zeros == report.zeros and report.parameters == 308 + 14
    index = (model[0].weight == 0).nonzero()[0]
    with torch.no_grad():
        model[0].weight[tuple(index)] = 5.0  # what an optimizer step may do
    pruner.update(0.8)
    pruner.apply_()
    assert model[0].weight[tuple(index)] == 5.0
    assert sparsity_report(model).zeros == round(0.8 * 308)


def test_apply_clears_whatever_the_optimizer_left():
    model = nn.Linear(8, 8)
    pruner = Pruner(weight_matrices(model))
    pruner.update(0.5)
    with torch.no_grad():
        model.weight[~pruner.masks["weight"]] = float("nan")
    pruner.apply_()
    assert torch.isfinite(model.weight).all() and sparsity_report(model).zeros == 32


def test_masked_gradients():
    model = nn.Linear(8, 8)
    pruner = Pruner(weight_matrices(model))
    pruner.update(0.75)
    model(torch.randn(2, 8)).sum().backward()
    pruner.mask_gradients_()
    assert torch.equal(model.weight.grad != 0, pruner.masks["weight"] & (model.weight.grad != 0))
    assert (model.weight.grad[~pruner.masks["weight"]] == 0).all() and model.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("latent", [False, True])
def test_gradients_of_pruned_weights_go_aside_while_others_are_clipped(latent):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    pruner = Pruner(weight_matrices(model), latent=latent)
    pruner.begin()
    pruner.update(0.75)
    pruner.apply_()
    model(torch.randn(3, 8)).square().sum().backward()
    before = {name: weight.grad.double().clone() for name, weight in pruner.weights.items()}
    biases = [layer.bias.grad.double().clone() for layer in model]
    kept = [before[name][mask] for name, mask in pruner.masks.items()]
    expected = float(torch.cat([*kept, *biases]).norm())  # of what the network has
    assert expected < 0.9 * float(torch.cat([g.flatten() for g in [*before.values(), *biases]]).norm())
    aside = pruner.set_gradients_aside_()
    limit = 0.5 * expected
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), limit))
    assert norm == pytest.approx(expected, rel=1e-5)
    pruner.put_gradients_back_(aside, limit / norm)
    for name, weight in pruner.weights.items():
        torch.testing.assert_close(weight.grad.double(), 0.5 * before[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("criterion", ["taylor", "movement"])
def test_weights_are_judged_by_gradients_that_were_clipped_alike(criterion):
    """Those of pruned weights are clipped by a quarter of the others' factor, and count whole."""
    torch.manual_seed(0)
    gathered = []
    for apart in (False, True):
        model = nn.Linear(16, 16)
        with torch.no_grad():
            model.weight.copy_(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))
        pruner = Pruner(weight_matrices(model), criterion)
        pruner.begin()
        for step in range(3):
            model.weight.grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(step)) * 8
            if apart and step:
                aside = pruner.set_gradients_aside_()
                model.weight.grad.mul_(0.5)
                pruner.put_gradients_back_(aside, 0.125, torch.tensor(0.25))
            elif step:
                model.weight.grad.mul_(0.5)
            pruner.before_step()
            pruner.after_step()
            if not step:
                pruner.update(0.75)
            pruner.apply_()
        gathered.append(next(iter(pruner.state()[f"gathered.{name}"] for name in pruner.records)))
    torch.testing.assert_close(*gathered)
    assert gathered[0].count_nonzero() == 256


def test_a_gradient_that_is_not_finite_does_not_go_aside():
    """Gradient scalers and checks of the loss have to see it."""
    model = nn.Linear(4, 4)
    pruner = Pruner(weight_matrices(model))
    pruner.update(0.5)
    model.weight.grad = torch.full((4, 4), 2.0)
    at = tuple((~pruner.masks["weight"]).nonzero()[0])
    model.weight.grad[at] = float("inf")
    aside = pruner.set_gradients_aside_()
    assert torch.isinf(model.weight.grad[at]) and torch.isfinite(aside["weight"]).all()
    pruner.put_gradients_back_(aside, 1.0)
    assert int((model.weight.grad == 2.0).sum()) == 15 and torch.isinf(model.weight.grad[at])


def test_masks_travel_and_misfits_are_refused():
    model, other = nn.Linear(8, 8), nn.Linear(8, 8)
    pruner, resumed = Pruner(weight_matrices(model)), Pruner(weight_matrices(other))
    pruner.update(0.75)
    resumed.masks_from(pruner.masks)
    assert torch.equal(resumed.masks["weight"], pruner.masks["weight"])
    with pytest.raises(ValueError, match="shape"):
        resumed.masks_from({"weight": torch.ones(3, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="wieght"):
        resumed.masks_from({"wieght": torch.ones(8, 8, dtype=torch.bool)})


def test_nothing_to_prune_is_an_error():
    with pytest.raises(ValueError, match="nothing to prune"):
        Pruner(weight_matrices(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))).check(0.5)


def test_zeros_of_a_sparse_model_are_kept():
    model = network()
    first = Pruner(weight_matrices(model))
    first.update(0.9)
    first.apply_()
    were = [record.weight == 0 for record in weight_matrices(model)]
    pruner = Pruner(weight_matrices(model))
    pruner.keep_zeros()
    assert pruner.initial_sparsity == pruner.target_count(0.9) / SIZE
    take_steps(model, pruner, torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1), 5)
    assert all(
        torch.equal(record.weight == 0, zero) for record, zero in zip(weight_matrices(model), were, strict=True)
    )


def with_zeros(count: int) -> tuple[nn.Linear, torch.Tensor]:
    """A layer, and where it came with zeros."""
    model = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.rand(8, 8) + 1)
        model.weight.view(-1)[:count] = 0
    return model, model.weight == 0


def one_step(pruner, gradient) -> None:
    pruner.begin()
    for weight in pruner.weights.values():
        weight.grad = gradient.clone()
    pruner.before_step()
    pruner.after_step()


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "movement"])
def test_zeros_stay_where_weights_without_a_gradient_score_zero_as_well(criterion):
    """Half the outputs are dead: what comes to them has gradient 0, by index behind the zeros that the model had."""
    model, zeros_before = with_zeros(16)
    pruner = Pruner(weight_matrices(model), criterion)
    pruner.keep_zeros()
    gradient = -torch.ones(8, 8)
    gradient[4:] = 0
    one_step(pruner, gradient)
    for sparsity in (0.25, 0.5, 0.8):
        pruner.update(sparsity)
        assert pruner.pruned_count == round(sparsity * 64) and not (pruner.masks["weight"] & zeros_before).any()
    pruner.update(0.5)
    if criterion == "taylor":  # then the dead ones
        assert pruner.masks["weight"][2:4].all() and int(pruner.masks["weight"][4:].sum()) == 16


def test_zeros_stay_and_others_are_ranked_however_far_apart_their_scores_are():
    model, zeros_before = with_zeros(16)
    pruner = Pruner(weight_matrices(model), "movement")
    pruner.keep_zeros()
    moved = torch.cat([torch.zeros(16), -torch.logspace(9, 1, 8), torch.arange(40) * 1e-12])
    one_step(pruner, -moved.view(8, 8) / torch.where(model.weight == 0, 1, model.weight))
    pruner.update(44 / 64)
    assert not pruner.masks["weight"].view(-1)[:44].any() and pruner.masks["weight"].view(-1)[44:].all()


def test_a_matrix_that_came_empty_stays_so_and_no_other_is_emptied():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    with torch.no_grad():
        model[0].weight.zero_()
    pruner = Pruner(weight_matrices(model), "movement")
    pruner.keep_zeros()
    pruner.begin()
    for name, weight in pruner.weights.items():
        weight.grad = weight.detach().sign() * (100 if name == "1.weight" else 1)  # all go to zero, one in great steps
    pruner.before_step()
    pruner.after_step()
    pruner.update(104 / 108)
    kept = [int(mask.sum()) for mask in pruner.masks.values()]
    assert kept == [0, 1, 3]


def test_a_pattern_goes_before_zeros_that_would_have_to_come_back():
    """One zero in a group of four at the first choice: refused, and not mended by breaking the pattern."""
    model = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.rand(8, 8) + 1)
        model.weight[:4] = 0
    pruner = Pruner(weight_matrices(model), "magnitude", Allocation(pattern=(2, 4)))
    pruner.keep_zeros()
    with pytest.raises(ValueError, match="has to get 16 of them back: prune single weights with the scope 'global'"):
        pruner.check(0.5)
    pruner.update(0.75)
    assert (pruner.masks["weight"].view(-1, 4).sum(1) <= 2).all() and not pruner.masks["weight"][:4].any()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=5e-2),
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.5),
        lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
    ],
    ids=["sgd", "adamw", "rmsprop"],
)
@pytest.mark.parametrize(
    "options", [{}, {"latent": True}, {"criterion": "learned"}], ids=["plain", "latent", "learned"]
)
def test_masks_survive_optimizers_and_averages(make, options):
    model = network()
    pruner = Pruner(weight_matrices(model), **options)
    optimizer, average = make(model.parameters()), WeightAverage(model, 0.9)
    pruner.begin(optimizer)
    take_steps(model, pruner, optimizer, 6, {1: 0.3, 3: 0.6, 5: 0.9})
    assert zeros(model) == pruner.pruned_count == round(0.9 * SIZE)
    pruner.finish(optimizer)
    pruner.apply_()
    masks = pruner.masks
    for step in range(7, 10):
        take_steps(model, pruner, optimizer, 1, start=step)
        average.update(model, step, masks)
        for record in weight_matrices(model):
            assert torch.equal(record.weight != 0, masks[record.name])
            assert (average.tensors[record.name][~masks[record.name]] == 0).all()


def test_a_deep_copy_goes_on_by_itself():
    model = network()
    pruner = Pruner(weight_matrices(model), latent=True)
    pruner.begin()
    take_steps(model, pruner, torch.optim.SGD(model.parameters(), 0.1), 2, {1: 0.5})
    twin, its = copy.deepcopy((model, pruner))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    take_steps(twin, its, torch.optim.SGD(twin.parameters(), 0.1), 2, {3: 0.9}, start=2)
    assert zeros(twin) == round(0.9 * SIZE) and zeros(model) == round(0.5 * SIZE)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("criterion", ["learned", "movement", "magnitude"])
def test_a_step_that_a_gradient_scaler_skips_changes_nothing(criterion):
    """fp16 training: gradients are unscaled before they are looked at, and a step with an overflow is left out."""
    model = network().eval()
    pruner = Pruner(weight_matrices(model), criterion, latent=True)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.5), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    pruner.begin(optimizer)

    def step(poison: bool) -> None:
        x, y = batch(1)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if poison:
            model[4].weight.grad[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        pruner.freeze_others(model)
        pruner.before_step()
        scaler.step(optimizer)
        scaler.update()
        pruner.after_step()
        pruner.apply_()

    step(poison=False)
    pruner.update(0.5)
    pruner.apply_()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = pruner.state().items()
    dense = {name: tensor.clone() for name, tensor in state if name.startswith(("latent.", "score."))}
    step(poison=True)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(pruner.state()[name], tensor) for name, tensor in dense.items())
    assert all(tensor.isfinite().all() for tensor in pruner.state().values())
    step(poison=False)
    assert any(not torch.equal(pruner.state()[name], tensor) for name, tensor in dense.items())


def test_parameters_may_be_replaced():
    """As wrapping for FSDP2 does."""
    model = network()
    pruner = Pruner(weight_matrices(model))
    model[4].weight = nn.Parameter(torch.randn(10, 128) * 10)
    pruner.update(0.5)
    pruner.apply_()
    assert zeros(model) == round(0.5 * SIZE)


# ---- latent weights ----


def test_latent_weights_move_by_the_gradient_at_the_pruned_network():
    """Written out in float64: v <- v - lr * gradient(mask * v), with momentum on v."""
    model = network().double().eval()
    pruner = Pruner(weight_matrices(model), latent=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    pruner.begin(optimizer)
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    velocity = {name: torch.zeros_like(value) for name, value in own.items()}
    masks = {}
    for step in range(1, 6):
        x, y = batch(step)
        points = {
            name: (value * masks[name] if name in masks else value).clone().requires_grad_()
            for name, value in own.items()
        }
        logits = torch.func.functional_call(model, points, (x.double(),))
        gradients = torch.autograd.grad(F.cross_entropy(logits, y), list(points.values()))
        for (name, value), gradient in zip(own.items(), gradients, strict=True):
            velocity[name] = 0.9 * velocity[name] + gradient
            own[name] = value - 0.05 * velocity[name]

        optimizer.zero_grad()
        F.cross_entropy(model(x.double()), y).backward()
        pruner.before_step()
        optimizer.step()
        pruner.after_step()
        if step in (1, 3):
            pruner.update(0.8)
            flat = torch.cat([own[record.name].flatten() for record in weight_matrices(model)]).abs().float()
            threshold = flat.sort().values[round(0.8 * SIZE) - 1]
            masks = {record.name: own[record.name].abs().float() > threshold for record in weight_matrices(model)}
            assert all(torch.equal(mask, masks[name]) for name, mask in pruner.masks.items())
        pruner.apply_()
        for name, parameter in model.named_parameters():
            expected = own[name] * masks[name] if name in masks else own[name]
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-14)


def test_a_weight_that_was_pruned_too_early_returns_only_with_latent_weights():
    def run(latent: bool) -> bool:
        layer = nn.Linear(2, 1, bias=False)
        layer.weight.data = torch.tensor([[1.0, 0.9]])
        pruner = Pruner(weight_matrices(layer), latent=latent)
        optimizer = torch.optim.SGD(layer.parameters(), 0.01)
        pruner.begin(optimizer)
        pruner.update(0.5)
        pruner.apply_()
        for _ in range(30):  # the second input is what matters
            optimizer.zero_grad()
            ((layer(torch.tensor([[0.0, 1.0]])) - 2) ** 2).sum().backward()
            pruner.before_step()
            optimizer.step()
            pruner.after_step()
            pruner.update(0.5)
            pruner.apply_()
        return bool(pruner.masks["weight"][0, 1])

    assert run(latent=True) and not run(latent=False)


# ---- learned scores ----


def test_scores_move_by_the_gradient_times_the_weight_and_nothing_else_does():
    model = network().double().eval()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    pruner = Pruner(weight_matrices(model), "learned", "uniform")
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    pruner.begin(optimizer)
    pruner.update(0.7)
    pruner.apply_()
    masks = pruner.masks
    scores = {  # HYDRA's scaled initialisation
        record.name: weights[record.name]
        / weights[record.name].abs().max()
        * (6 / weights[record.name][0].numel()) ** 0.5
        for record in weight_matrices(model)
    }
    for name, score in scores.items():
        kept = score.abs().float()
        assert torch.equal(masks[name], kept > kept.flatten().sort().values[round(0.7 * score.numel()) - 1])
    x, y = batch(1)
    points = {name: (value * masks.get(name, 1)).requires_grad_() for name, value in weights.items()}
    loss = F.cross_entropy(torch.func.functional_call(model, points, (x.double(),)), y)
    gradients = dict(zip(points, torch.autograd.grad(loss, list(points.values())), strict=True))
    optimizer.zero_grad()
    F.cross_entropy(model(x.double()), y).backward()
    pruner.freeze_others(model)
    pruner.before_step()
    optimizer.step()
    pruner.after_step()
    pruner.apply_()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), weights[name] * masks.get(name, 1), rtol=0, atol=0)
    found = {name[6:]: tensor for name, tensor in pruner.state().items() if name.startswith("score.")}
    for name, score in scores.items():
        expected = score - 0.5 * gradients[name] * weights[name] * score.sign()
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("epsilon", "kept"), [(0.2, "robust"), (0.0, "large")])
def test_scores_prune_large_weights_when_the_robust_loss_says_so(epsilon, kept):
    """
    Twenty inputs tell the class by a little and surely, and have large weights: any adversary turns them round. Twenty
    tell it by much and with noise, and have small weights. (The adversary moves every input, as it does in a network
    where other layers read it as well.)
    """
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (512,), generator=generator) * 2.0 - 1
    sure = 0.05 * y[:, None].expand(-1, 20)
    noisy = y[:, None] + 4.0 * torch.randn(512, 20, generator=generator)
    x = torch.cat([sure, noisy], 1)
    layer = nn.Linear(40, 1, bias=False)
    layer.weight.data = torch.cat([torch.full((20,), 2.0), torch.full((20,), 0.05)])[None]

    by_magnitude = Pruner(weight_matrices(layer))
    by_magnitude.update(0.5)
    assert by_magnitude.masks["weight"][0, :20].all()

    pruner = Pruner(weight_matrices(layer), "learned")
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    pruner.begin(optimizer)
    pruner.update(0.5)
    pruner.apply_()
    for _ in range(200):
        optimizer.zero_grad()
        F.softplus(-y * layer(x - epsilon * y[:, None]).squeeze(-1)).mean().backward()
        pruner.before_step()
        optimizer.step()
        pruner.after_step()
        pruner.update(0.5)
        pruner.apply_()
    large = int(pruner.masks["weight"][0, :20].sum())
    assert large == 0 if kept == "robust" else large == 20


def test_moments_of_scores_are_not_taken_for_those_of_weights():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    pruner = Pruner(weight_matrices(model), "learned")
    take_steps(model, pruner, optimizer, 2)
    assert model[4].weight in optimizer.state
    pruner.begin(optimizer)
    pruner.update(0.5)
    pruner.apply_()
    assert model[4].weight not in optimizer.state and model[4].bias in optimizer.state
    take_steps(model, pruner, optimizer, 2)
    pruner.finish(optimizer)
    assert model[4].weight not in optimizer.state and not pruner.learns_scores


# ---- criteria that look at gradients ----


def gathered(criterion: str) -> tuple[dict, Pruner]:
    """Gradients and latent weights of three steps, and the pruner that has seen them."""
    model = network().double().eval()
    pruner = Pruner(weight_matrices(model), criterion)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner.begin(optimizer)
    seen = {record.name: [] for record in weight_matrices(model)}
    for step in (1, 2, 3):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x.double()), y).backward()
        for record in weight_matrices(model):
            seen[record.name].append((record.weight.grad.clone(), record.weight.detach().clone()))
        pruner.before_step()
        optimizer.step()
        pruner.after_step()
    now = {record.name: record.weight.detach() for record in weight_matrices(model)}
    pruner.update(0.6)
    return {name: (pairs, now[name]) for name, pairs in seen.items()}, pruner


@pytest.mark.parametrize("criterion", ["taylor", "movement"])
def test_taylor_and_movement(criterion):
    seen, pruner = gathered(criterion)
    scores = {}
    for name, (pairs, now) in seen.items():
        if criterion == "taylor":
            scores[name] = (now * sum(gradient for gradient, _ in pairs) / 3).abs()
        else:
            scores[name] = -sum(gradient * weight for gradient, weight in pairs)
    flat = torch.cat([score.flatten() for score in scores.values()])
    threshold = flat.sort().values[round(0.6 * SIZE) - 1]
    wrong = sum(int((pruner.masks[name] != (score > threshold)).sum()) for name, score in scores.items())
    assert wrong <= 2  # the pruner compares in float32


@pytest.mark.parametrize("criterion", ["taylor", "movement"])
def test_gradients_of_half_precision_are_gathered_in_full(criterion):
    """The same gradients choose the same weights, whatever the dtype of the weights that they are of."""
    masks = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        layer = nn.Linear(32, 32, bias=False).bfloat16().to(dtype)
        pruner = Pruner(weight_matrices(layer), criterion)
        pruner.begin()
        drawn = torch.Generator().manual_seed(1)
        base = torch.randn(32, 32, generator=drawn)
        for _ in range(600):
            noise = torch.randn(32, 32, generator=drawn)
            layer.weight.grad = ((base + noise) * 1e-3).bfloat16().to(dtype)
            pruner.before_step()
            pruner.after_step()
        pruner.update(0.9)
        masks.append(pruner.masks["weight"])
    assert int((masks[0] & ~masks[1]).sum()) <= 1


def test_a_criterion_of_your_own():
    def smallest(matrices, gradients):
        return {record.name: 1 / (1 + record.weight.abs()) for record in matrices}

    register_criterion("smallest", smallest)
    layer = nn.Linear(8, 8)
    pruner = Pruner(weight_matrices(layer), "smallest")
    pruner.update(0.5)
    kept = pruner.masks["weight"]
    assert layer.weight[kept].abs().max() < layer.weight[~kept].abs().min()


def test_gradients_that_are_not_there_are_asked_for():
    pruner = Pruner(weight_matrices(nn.Linear(8, 8)), "taylor")
    with pytest.raises(ValueError, match="'taylor' needs gradients and there were none"):
        pruner.update(0.5)
    pruner.begin()
    with pytest.raises(ValueError, match="'taylor' needs gradients and there were none"):
        pruner.update(0.5)
    with pytest.raises(ValueError, match="use one of magnitude, .*register_criterion"):
        Pruner(weight_matrices(nn.Linear(8, 8)), "size")
    with pytest.raises(ValueError, match="'sum' is unknown"):
        register_criterion("mine", lambda matrices, gradients: {}, gradients="sum")
    with pytest.raises(ValueError, match="'gates' needs gates"):
        Pruner(weight_matrices(nn.Linear(8, 8)), "gates").check(0.5)


# ---- learned rates of layers ----


def test_a_layer_that_matters_more_keeps_more():
    """Two layers in parallel, alike in every weight; the loss asks one of them for its pruned weights."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
            self.two.weight = nn.Parameter(self.one.weight.detach().clone())

    model = Both()
    target = model.one.weight.detach().clone()
    pruner = Pruner(weight_matrices(model), "magnitude", "learned", rate_learning_rate=0.05)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    pruner.begin(optimizer)
    pruner.update(0.8)
    pruner.apply_()
    kept = pruner.masks["one.weight"].sum() - pruner.masks["two.weight"].sum()
    assert abs(int(kept)) <= 1
    for _ in range(40):
        optimizer.zero_grad()
        ((model.one.weight - target) ** 2).sum().add((model.two.weight**2).sum()).backward()
        pruner.before_step()
        optimizer.step()
        pruner.after_step()
        pruner.update(0.8)
        pruner.apply_()
    masks = pruner.masks
    assert masks["one.weight"].sum() > 1.5 * masks["two.weight"].sum()
    assert pruner.pruned_count == round(0.8 * 2 * 64 * 64)


def test_learned_rates_need_scores_that_are_not_negative():
    model = network()
    pruner = Pruner(weight_matrices(model), "movement", "learned")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner.begin(optimizer)
    with pytest.raises(ValueError, match="'movement' has negative ones"):
        take_steps(model, pruner, optimizer, 2, {2: 0.5})


# ---- interruptions ----


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"latent": True},
        {"criterion": "learned"},
        {"criterion": "taylor"},
        {"criterion": "movement"},
        {"criterion": "learned", "allocation": Allocation("learned", pattern=(1, 2))},
        {"criterion": "movement", "zeros": True},
    ],
    ids=["plain", "latent", "learned", "taylor", "movement", "learned-rates-and-pattern", "zeros-that-stay"],
)
@pytest.mark.parametrize("cut", [2, 3, 5])
def test_the_state_is_all_that_is_needed(options, cut):
    """Cut off after any step of the schedule: what goes on is bit for bit the same."""
    sparsities = {2: 0.5, 4: 0.7, 6: 0.9}

    def begun():
        model = network()
        if "allocation" in options:
            model[0] = nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False)
        exclude = ["0.weight"] if "allocation" in options else []
        pruner = Pruner(weight_matrices(model, exclude), **{n: v for n, v in options.items() if n != "zeros"})
        if "zeros" in options:
            with torch.no_grad():
                model[4].weight[:, :40] = 0
            pruner.keep_zeros()
        return model, pruner

    whole, pruner = begun()
    start = copy.deepcopy(whole.state_dict())
    optimizer = torch.optim.AdamW(whole.parameters(), 0.01)
    pruner.begin(optimizer)
    take_steps(whole, pruner, optimizer, cut, sparsities)
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), pruner.state()))
    take_steps(whole, pruner, optimizer, 7 - cut, sparsities, start=cut)

    resumed, its = begun()
    resumed.load_state_dict(start)
    optimizer = torch.optim.AdamW(resumed.parameters(), 0.01)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    if "zeros" in options:  # the model has pruned weights as well by now
        its.keep_zeros()
    its.load_state(saved[2])
    take_steps(resumed, its, optimizer, 7 - cut, sparsities, start=cut)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    ours, theirs = pruner.state(), its.state()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_state_of_another_way_of_pruning_is_refused():
    model = network()
    pruner = Pruner(weight_matrices(model), "learned")
    pruner.begin()
    pruner.update(0.5)
    for other in (Pruner(weight_matrices(model)), Pruner(weight_matrices(model), "movement")):
        with pytest.raises(ValueError, match="another way of pruning than criterion="):
            other.load_state(pruner.state())
    with pytest.raises(ValueError, match="scope='learned'"):
        Pruner(weight_matrices(model), "learned", "learned").load_state(pruner.state())


# ---- every criterion on every architecture ----


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "criterion", ["magnitude", "scaled-magnitude", "lamp", "taylor", "movement", "gates", "learned"]
)
def test_exact_for_every_criterion(criterion, name):
    model = ARCHITECTURES[name]()
    if criterion == "gates":
        attach_gates(model)
    pruner = Pruner(weight_matrices(model), criterion)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    pruner.begin(optimizer)
    x = torch.rand(4, 3, *((8, 8) if name == "vit" else (32, 32)))
    for sparsity in (0.6, 0.985):
        output = model(x)
        F.cross_entropy(output if isinstance(output, torch.Tensor) else output.logits, torch.arange(4)).backward()
        pruner.freeze_others(model)
        pruner.before_step()
        optimizer.step()
        optimizer.zero_grad()
        pruner.after_step()
        pruner.update(sparsity)
        pruner.apply_()
        of_its_own = sum(int((mask & (pruner.weights[name] == 0)).sum()) for name, mask in pruner.masks.items())
        assert of_its_own == 0
        assert zeros(model) - of_its_own == pruner.pruned_count == pruner.target_count(sparsity)
    pruner.finish(optimizer)
    pruner.apply_()
    assert zeros(model) - of_its_own == pruner.target_count(0.985)
