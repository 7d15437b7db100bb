"""What does not fit together is refused before anything is attacked or written, and few images are read for it."""

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

from tscnc_hf.evaluation.fitting import check_stored_labels, device_of
from tscnc_hf.evaluation.measures import robustness
from tscnc_hf.evaluation.measures.examples import adversarial_examples
from tscnc_hf.evaluation.measures.lipschitz import evaluate_lipschitz
from tscnc_hf.evaluation.measures.robustness import evaluate_robustness
from tscnc_hf.evaluation.run import evaluate


class Pixels:
    image_mean, image_std = [0.0], [1.0]


def network(outputs=3, channels=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, outputs))


class Sorted:
    """Images sorted by class, read one by one; what is stored of their labels is said apart from them."""

    class_names = ["cat", "dog", "eel", "fox"]

    def __init__(self, labels, said=None):
        self.items = [{"pixel_values": torch.full((3, 8, 8), 0.5), "labels": label} for label in labels]
        self.labels, self.read = torch.tensor(labels if said is None else said), []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, place):
        self.read.append(place)
        return self.items[place]


@pytest.fixture
def no_attack(monkeypatch):
    def attacked(*args, **kwargs):
        pytest.fail("a batch was attacked")

    monkeypatch.setattr(robustness, "_attack_batch", attacked)


OPTIONS = {"epsilon": 0.1, "batch_size": 4, "processing_class": Pixels, "progress": False}


@pytest.mark.usefixtures("no_attack")
@pytest.mark.parametrize("progress", [False, True])
def test_a_class_without_an_output_at_the_end_of_many_images(progress, tmp_path):
    data = Sorted([0] * 4 + [1] * 4 + [2] * 4 + [3])
    message = r"labels lie between 0 and 3, the model has 3 outputs \(0 to 2\).*Label 3 is 'fox': leave out"
    given = OPTIONS | {"progress": progress}
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(network(), data, "pgd-2", state_folder=tmp_path / "state", **given)
    with pytest.raises(ValueError, match=message):
        evaluate(network(), Subset(data, range(13)), attacks=("pgd-2",), folder=tmp_path, **given)
    assert set(data.read) == {0, 12} and list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_attack")
@pytest.mark.parametrize("progress", [False, True])
def test_labels_that_are_in_the_items_alone(progress):
    data = [Sorted([0, 1, 2, 7])[place] for place in range(4)]  # a list has them at hand
    with pytest.raises(ValueError, match="labels lie between 0 and 7, the model has 3 outputs"):
        evaluate(network(), data, attacks=("pgd-2",), **(OPTIONS | {"progress": progress}))
    data = Sorted([7, 1, 2, 0])
    del data.labels
    with pytest.raises(ValueError, match="labels lie between 7 and 7, the model has 3 outputs"):
        evaluate(network(), data, attacks=("pgd-2",), **(OPTIONS | {"progress": progress}))


@pytest.mark.usefixtures("no_attack")
def test_the_time_is_not_estimated_of_labels_that_the_model_does_not_have():
    data = Sorted([0, 7, 1])
    del data.labels
    with pytest.raises(ValueError, match="labels lie between 0 and 7, the model has 3 outputs"):
        evaluate(network(), data, attacks=("pgd-2",), **(OPTIONS | {"progress": True}))


@pytest.mark.usefixtures("no_attack")
def test_an_attack_that_needs_more_classes_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="'apgd-dlr' needs at least 3 classes, there are 2"):
        evaluate_robustness(network(2), Sorted([0, 1]), "apgd-dlr", state_folder=tmp_path / "state", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_items_have_the_last_word_on_labels():
    """A data set may number what it stores anew."""
    check_stored_labels(Sorted([0, 1, 2], said=[10, 11, 12]), [0, 1, 2], 3)
    check_stored_labels(Sorted([0, 1, 2, 3]), [0, 1, 2], 3)  # the others are not tested
    with pytest.raises(ValueError, match="labels lie between -1 and 2.*those below 0 are of images without a class"):
        check_stored_labels(Sorted([0, -1, 2]), [0, 1, 2], 3)


# ---- the dense model ----


@pytest.mark.usefixtures("no_attack")
@pytest.mark.parametrize(
    "dense, message",
    [
        (lambda: network(outputs=2), r"dense_model: the Sequential returns \(1, 2\) of one image.* has 3 outputs"),
        (lambda: network(outputs=5), r"dense_model: the Sequential returns \(1, 5\) of one image.* has 3 outputs"),
        (lambda: network(channels=1), "dense_model: an image of 3x8x8 does not go through the Sequential: .*channels"),
        (lambda: nn.Sequential(nn.Conv2d(3, 1, 9)), "dense_model: an image of 3x8x8 does not go through"),
        (lambda: nn.Sequential(nn.Embedding(2, 3)), "dense_model: an image of 3x8x8 does not go through"),
    ],
)
def test_a_dense_model_that_does_not_fit(dense, message, tmp_path):
    data = Sorted([0, 1, 2] * 4)
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(network(), data, "pgd-2", dense_model=dense(), **OPTIONS)
    with pytest.raises(ValueError, match=message):
        evaluate(network(), data, attacks="pgd-2", dense_model=dense(), folder=tmp_path, **OPTIONS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_attack")
def test_a_dense_model_that_does_not_say_how_its_inputs_are_made():
    class Ambiguous:
        pass

    with pytest.raises(ValueError, match="dense_model: .* cannot tell how Sequential normalises"):
        evaluate_robustness(
            network(), Sorted([0, 1]), "fgsm", dense_model=network(), dense_processing_class=Ambiguous, **OPTIONS
        )


@pytest.mark.usefixtures("no_attack")
def test_a_dense_model_that_nothing_uses():
    data, dense = Sorted([0, 1, 2]), network()
    with pytest.raises(ValueError, match="dense_model is for the masking checks alone, and masking=False"):
        evaluate_robustness(network(), data, "pgd-2", dense_model=dense, masking=False, **OPTIONS)
    with pytest.raises(ValueError, match="dense_model is for the checks .* alone, and full=False"):
        evaluate(network(), data, attacks="pgd-2", dense_model=dense, full=False, **OPTIONS)
    for options in ({"attacks": "clean"}, {"attacks": ("clean", "pgd-2"), "epsilon": 0}):
        with pytest.raises(ValueError, match="there are none where nothing is attacked"):
            evaluate(network(), data, dense_model=dense, **(OPTIONS | options))
    with pytest.raises(ValueError, match="dense_processing_class is of a dense_model, and none is given"):
        evaluate_robustness(network(), data, "pgd-2", dense_processing_class=Pixels, **OPTIONS)


def test_a_dense_model_that_is_given_later_is_looked_at_before_its_checks(tmp_path, monkeypatch):
    data = Sorted([0, 1, 2] * 4)
    evaluate_robustness(network(), data, "pgd-2", state_folder=tmp_path, **OPTIONS)
    monkeypatch.setattr(robustness, "masking_report", None)  # a call is an error
    with pytest.raises(ValueError, match="dense_model: the Sequential returns"):
        evaluate_robustness(network(), data, "pgd-2", state_folder=tmp_path, dense_model=network(outputs=5), **OPTIONS)


class OfBuffers(nn.Module):
    """A linear classifier none of whose numbers is to be trained."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(4, 12))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


def test_a_model_without_parameters_is_where_its_buffers_are():
    model, x = OfBuffers(), torch.rand(6, 3, 2, 2)
    data = [{"pixel_values": image, "labels": int(model(image[None]).argmax())} for image in x]
    same = {"epsilon": 0.1, "processing_class": Pixels}
    report = evaluate_robustness(model, data, ("clean", "pgd-2"), progress=False, **same)
    assert report["clean"].correct == 6
    assert len(evaluate_lipschitz(model, data, steps=1, **same).local) == 6
    assert len(adversarial_examples(model, data, attack="pgd-2", **same).clean) == 6
    assert device_of(OfBuffers().to("meta")).type == "meta" and device_of(nn.ReLU()).type == "cpu"
