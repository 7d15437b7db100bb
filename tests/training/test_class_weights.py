"""Classes that count alike: the weights, and that every objective and every accumulation has them."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset

from tscnc_hf.method.adversarial.objectives import OBJECTIVES, objective_terms
from tscnc_hf.training.checks import check_labels
from tscnc_hf.training.class_weights import balanced_weights, image_weights


LABELS = [0] * 12 + [1] * 3 + [3] * 5


def items(labels, key="labels") -> list[dict]:
    return [{"pixel_values": torch.rand(3, 8, 8), key: label} for label in labels]


@pytest.mark.parametrize(
    "made",
    [
        lambda: items(LABELS),
        lambda: items(torch.tensor(LABELS), "label"),
        lambda: Subset(items([2, *LABELS, 2]), range(1, 21)),
        lambda: ConcatDataset([items(LABELS[:7]), Subset(items(LABELS), range(7, 20))]),
    ],
)
def test_as_scikit_learn_has_them(made):
    weights = balanced_weights(nn.Linear(1, 1), made())
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=np.array(LABELS))
    assert weights.tolist() == pytest.approx([expected[0], expected[1], 0, expected[2]])
    assert weights[LABELS].mean().item() == pytest.approx(1)


def test_of_a_dataset_only_the_labels_are_read(digits):
    import datasets

    rows = datasets.Dataset.from_dict({"label": LABELS, "pixel_values": [[0.0]] * 20})
    rows.set_transform(lambda batch: 1 / 0)
    assert torch.equal(balanced_weights(nn.Linear(1, 1), rows), balanced_weights(nn.Linear(1, 1), items(LABELS)))
    assert balanced_weights(nn.Linear(1, 1), digits.train).shape == (10,)


@pytest.mark.parametrize(
    "labels", [[0, 1, 2, 3], range(4), ["cat"] * 20, None, {"cat": 0}, np.zeros(20), [[0]] * 20, torch.tensor(3)]
)
def test_an_attribute_that_is_not_the_label_of_each_image_is_passed_over(labels):
    class Own(Dataset):
        def __init__(self):
            self.items, self.labels = items(LABELS), labels

        def __len__(self):
            return len(self.items)

        def __getitem__(self, place):
            return self.items[place]

    own, expected = Own(), balanced_weights(nn.Linear(1, 1), items(LABELS))
    for data in (own, ConcatDataset([own]), Subset(own, range(20))):
        assert torch.equal(balanced_weights(nn.Linear(1, 1), data), expected)
    with pytest.raises(TypeError, match="cannot read labels off Own"):
        check_labels(own, 4)
    own.labels = np.array(LABELS)
    with pytest.raises(ValueError, match="labels run from 0 to 3"):
        check_labels(own, 3)


def test_what_has_no_classes_to_count_is_refused(build, make_trainer):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from items(LABELS)

    for data, message in ((None, "no train_dataset"), (Stream(), "a stream"), (items(torch.rand(4, 3)), "float32")):
        with pytest.raises(ValueError, match=f"class_weights='balanced'.*{message}"):
            balanced_weights(nn.Linear(1, 1), data)
    with pytest.raises(ValueError, match="class_weights='even' is unknown; use one of none, balanced"):
        make_trainer(build("vit"), class_weights="even")


def test_shares_of_classes_weigh_by_them():
    weights = torch.tensor([1.0, 3.0])
    assert image_weights(weights, torch.tensor([1, 0])).tolist() == [3, 1]
    assert image_weights(weights, torch.tensor([[0.5, 0.5], [1.0, 0.0]])).tolist() == [2, 1]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_repeat_images_in_every_objective(objective, smoothing):
    """An image of weight 3 counts as three images; parts of a batch add up to it."""
    torch.manual_seed(0)
    model, options = nn.Sequential(nn.Flatten(), nn.Linear(27, 4)), {"beta": 2.0, "label_smoothing": smoothing}
    x, y = torch.rand(5, 3, 3, 3), torch.tensor([0, 1, 2, 3, 1])
    x_adv, weights = (x + 0.1 * torch.randn_like(x)).clamp(0, 1), torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0])
    often = weights.long()
    places = torch.arange(5).repeat_interleave(often)
    weighted = objective_terms(objective, model, x, x_adv, y, weights=weights, **options)
    repeated = objective_terms(objective, model, x[places], x_adv[places], y[places], **options)
    assert weighted.keys() == repeated.keys()
    for name, value in weighted.items():
        assert value.item() == pytest.approx(repeated[name].item() * len(places) / 5, rel=1e-5)
    parts = [
        objective_terms(objective, model, x[part], x_adv[part], y[part], weights=weights[part], **options)
        for part in (slice(0, 2), slice(2, 5))
    ]
    for name, value in weighted.items():
        assert value.item() == pytest.approx((2 * parts[0][name] + 3 * parts[1][name]).item() / 5, rel=1e-5)
    alike = objective_terms(objective, model, x, x_adv, y, weights=torch.ones(5), **options)
    plain = objective_terms(objective, model, x, x_adv, y, **options)
    assert all(torch.equal(alike[name], plain[name]) for name in plain)


@pytest.mark.parametrize("objective", ["natural", "trades"])
def test_accumulated_steps_are_those_of_the_whole_batch(objective, build, make_trainer, digits):
    """Batches of 8 and 2 times 4, the last micro-batch smaller; classes are uneven."""
    of = {label: (digits.train.labels == label).nonzero().flatten().tolist() for label in range(3)}
    places = of[0][:12] + of[1][:6] + of[2][:4]
    found = []
    for size, accumulation in ((8, 1), (4, 2)):
        model, processor = build("vit")
        trainer = make_trainer(
            (model, processor), train=digits.train.subset(places), objective=objective, num_train_epochs=1,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, class_weights="balanced",
            target_sparsity=0.0, cnc_weight=0.0, tsc_weight=0.0, optim="sgd", learning_rate=0.1,
            lr_scheduler_type="constant",
        )  # fmt: skip
        assert len(set(trainer.class_weights.tolist())) > 2
        trainer.train()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*found, atol=2e-5)
