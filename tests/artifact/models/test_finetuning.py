"""Checkpoints to train on: heads, class names, image sizes; and the recipe on sparse and packed ones."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_pil_image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
)

from tscnc_hf import load_sparse, save_sparse
from tscnc_hf.artifact.models.building import timm_model, vit_from_config
from tscnc_hf.artifact.models.config import input_format
from tscnc_hf.artifact.models.finetuning import load_for_finetuning
from tscnc_hf.artifact.models.loading import load_model, logits_fn
from tscnc_hf.artifact.models.preprocessing import preprocessing


RECIPE = Path(__file__).parents[3] / "recipes" / "finetune.py"
NAMES = ["red panda", "owl", "fox"]
DIGITS = [str(digit) for digit in range(10)]
SMALL = {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]}


def saved(kind: str, folder: Path, names=NAMES, size=16) -> str:
    torch.manual_seed(3)
    if kind == "vit":
        sizes = {"patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model, processor = vit_from_config(names, (size, size), **sizes)
    elif kind == "timm":
        model, processor = timm_model("resnet18", names, (size, size), model_args=SMALL)
    else:
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        config = ConvNextConfig(
            image_size=size, patch_size=2, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], **labels
        )
        model, processor = ConvNextForImageClassification(config), ConvNextImageProcessor(size={"shortest_edge": size})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def head_of(kind: str) -> str:
    return "timm_model.fc" if kind == "timm" else "classifier"


@pytest.mark.parametrize("kind", ["vit", "timm", "convnext"])
def test_other_classes_get_a_new_head_and_everything_else_stays(kind, tmp_path):
    folder = saved(kind, tmp_path)
    before = load_model(folder)[0].state_dict()
    assert input_format(folder) == (16, "rgb")
    model, processor, changes = load_for_finetuning(folder, DIGITS, (16, 16))
    assert changes == "new head for 10 classes in place of one for 3; images of 16x16"
    assert list(model.config.id2label.values()) == DIGITS and model.config.label2id["7"] == 7
    for name, tensor in model.state_dict().items():
        if name.startswith(head_of(kind)):
            assert len(tensor) == 10
        else:
            assert torch.equal(tensor, before[name]), name
    weight = model.state_dict()[f"{head_of(kind)}.weight"]
    assert 0.001 < weight.std() < 1 and weight.abs().max() < 2  # drawn, not left as memory had it
    assert logits_fn(model, processor)(torch.rand(2, 3, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize(
    "new, kept, said",
    [
        (NAMES, NAMES, "head for 3 classes kept"),
        (["0", "1", "2"], NAMES, "head for 3 classes kept"),  # the data set knows no names
        (["1", "2", "3"], NAMES, "head for 3 classes kept"),
        (["a", "b", "c"], ["a", "b", "c"], "kept, renamed from red panda, owl, fox ... to a, b, c ..."),
    ],
)
def test_as_many_classes_keep_the_head(new, kept, said, tmp_path):
    folder = saved("timm", tmp_path)
    model, _, changes = load_for_finetuning(folder, new, (16, 16))
    assert said in changes and list(model.config.id2label.values()) == kept
    assert model.config.label2id == {name: index for index, name in enumerate(kept)}
    assert torch.equal(model.timm_model.fc.weight, load_model(folder)[0].timm_model.fc.weight)


@pytest.mark.parametrize("kind", ["vit", "timm", "convnext"])
@pytest.mark.parametrize(
    "old, new, rows",
    [
        (["bird", "cat", "dog"], ["cat", "dog", "emu"], [1, 2, 0]),
        (["bird", "cat", "dog"], ["ant", "Bird", "yak"], [1, 0, 2]),
        (["bird", "cat", "dog"], ["bird", "cat", "emu"], [0, 1, 2]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["1", "2", "7"], [1, 2, 0]),
    ],
)
def test_what_a_head_knows_of_a_class_moves_with_its_name(kind, old, new, rows, tmp_path):
    folder = saved(kind, tmp_path, old)
    before = load_model(folder)[0]
    with torch.no_grad():  # a bias, too, which tells rows apart
        before.get_parameter(f"{head_of(kind)}.bias").copy_(torch.arange(3.0))
    before.save_pretrained(folder)
    model, processor, changes = load_for_finetuning(folder, new, (16, 16))
    assert list(model.config.id2label.values()) == new
    assert (", its rows moved to where the data set has their classes, renamed from" in changes) == (rows != [0, 1, 2])
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(logits_fn(model, processor)(x), logits_fn(before, processor)(x)[:, rows])


def test_classes_in_another_order_are_refused(tmp_path):
    with pytest.raises(ValueError, match="red panda, owl, fox; the data set has them in another order: owl, fox"):
        load_for_finetuning(saved("vit", tmp_path), ["owl", "fox", "red panda"], (16, 16))


def test_numbers_are_compared_where_the_model_has_no_names(tmp_path):
    labels = [f"LABEL_{number}" for number in range(12)]
    folder = saved("vit", tmp_path / "12", labels)
    with pytest.raises(ValueError, match=r"\(label 2 is 'LABEL_2' in the model, '10' in the data set\)"):
        load_for_finetuning(folder, sorted(str(number) for number in range(12)), (16, 16))
    cases = {tuple(f"{number:02}" for number in range(12)): labels}  # they say no more than the model's own
    cases |= {names: list(names) for names in (tuple(f"{i:02}" for i in range(1, 13)), tuple("abcdefghijkl"))}
    for new, kept in cases.items():
        model, _, said = load_for_finetuning(folder, list(new), (16, 16))
        assert "head for 12 classes kept" in said and list(model.config.id2label.values()) == kept


@pytest.mark.parametrize("kind", ["timm", "convnext"])
def test_another_image_size_is_written_down(kind, tmp_path):
    model, processor, changes = load_for_finetuning(saved(kind, tmp_path / "old"), NAMES, (32, 32), (32, 32))
    assert changes.endswith("images of 32x32, of 16x16 so far")
    model.save_pretrained(tmp_path / "new")
    processor.save_pretrained(tmp_path / "new")
    assert input_format(str(tmp_path / "new")) == (32, "rgb")
    stock = AutoImageProcessor.from_pretrained(tmp_path / "new")
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    inputs = stock(to_pil_image(pixels), return_tensors="pt")["pixel_values"]
    assert inputs.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("kind", ["vit", "timm", "convnext"])
def test_a_model_of_larger_images_is_fine_tuned_against_an_attacker_of_small_ones(kind, tmp_path):
    """Its image processor is the one it had; gradients reach the image of 8x8."""
    _, before = load_model(folder := saved(kind, tmp_path))
    model, processor, changes = load_for_finetuning(folder, NAMES, (8, 8))
    assert ", resized to 16x16 (bi" in changes and changes.endswith("for the model")
    assert processor.to_dict() == before.to_dict() and input_format(model, processor) == (16, "rgb")
    pixels = torch.rand(2, 3, 8, 8, requires_grad=True)
    assert torch.autograd.grad(logits_fn(model, processor)(pixels)[:, 0].sum(), pixels)[0].shape == (2, 3, 8, 8)
    if kind == "convnext":  # which would enlarge and crop also those that have its size
        model, processor, changes = load_for_finetuning(folder, NAMES, (16, 16))
        image = to_pil_image(torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8))
        assert preprocessing(model, processor).resize(16, 16) is None and changes.endswith("images of 16x16")
        assert preprocessing(*load_model(folder)).resize(16, 16).crop is not None
        assert processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 16)


def test_a_size_that_does_not_go_through_is_refused(tmp_path):
    with pytest.raises(ValueError, match="images of 32x32 pixels do not go through the model.*Leave input_size out"):
        load_for_finetuning(saved("vit", tmp_path), NAMES, (8, 8), (32, 32))


def test_weights_that_are_not_there_are_not_drawn_at_random(tmp_path):
    folder = saved("convnext", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")

    def store(changed: dict) -> None:
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})

    store({name: tensor for name, tensor in weights.items() if not name.startswith("classifier")})  # a backbone
    assert load_model(folder, DIGITS)[0].classifier.weight.shape == (10, 16)
    assert load_for_finetuning(folder, NAMES, (16, 16))[0].num_labels == 3
    assert "new head for 3 classes, it had none" in load_for_finetuning(folder, NAMES, (16, 16))[2]
    with pytest.raises(ValueError, match="2 missing: classifier.bias, classifier.weight.*can be fine-tuned"):
        load_model(folder)
    inner = next(name for name in weights if name.endswith("pwconv1.weight"))
    store({name: tensor for name, tensor in weights.items() if name != inner})
    with pytest.raises(ValueError, match="pwconv1.weight"):
        load_model(folder, DIGITS)
    store(
        weights | {inner: weights[inner][:, :-1].contiguous()}
    )  # that a new head may differ is no licence for others
    with pytest.raises(ValueError, match=r"of another shape: .*pwconv1.weight \(.*\) for \("):
        load_model(folder, DIGITS)


@pytest.mark.parametrize("class_names", [None, DIGITS])
def test_statistics_of_batch_norms_are_weights_too(class_names, tmp_path):
    folder = saved("timm", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    counts = {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
    save_file(counts, tmp_path / "model.safetensors", metadata={"format": "pt"})
    state = load_model(folder, class_names)[0].state_dict()
    assert all(count == 0 for name, count in state.items() if name.endswith("num_batches_tracked"))
    name = next(name for name in counts if name.endswith("running_var"))
    save_file(
        {k: v for k, v in counts.items() if k != name}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match=f"1 missing: .*{name.split('.', 1)[1]}"):
        load_model(folder, class_names)


# ---- the recipe ----


@pytest.fixture
def finetune(tmp_path, capsys):
    """`finetune(checkpoint, **options)`: a tiny run on the digits; the output folder and what was printed."""

    def run(checkpoint, **options):
        defaults = {
            "dataset": "digits", "train_limit": 32, "test_limit": 8, "test_attacks": "clean", "augmentation": "none",
            "max_steps": 4, "per_device_train_batch_size": 8, "logging_steps": 1, "objective": "pgd-at",
            "adversary": "fgsm-rs", "epsilon": "0.05", "eval_strategy": "no", "save_strategy": "no",
            "pruning_interval": 1, "disable_tqdm": "true", "use_cpu": "true", "report_to": "none",
            "learning_rate": "1e-2",
        }  # fmt: skip
        given = defaults | {"model_name_or_path": checkpoint, "output_dir": tmp_path / "out"} | options
        main = runpy.run_path(str(RECIPE))["main"]
        main([str(text) for name, value in given.items() for text in (f"--{name}", value)])
        return tmp_path / "out", capsys.readouterr().out

    return run


def test_a_packed_sparse_model_keeps_its_zeros(finetune, tmp_path):
    model, _ = load_model(saved("timm", tmp_path / "dense", DIGITS, size=8))
    generator = torch.Generator().manual_seed(0)
    zeros = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                zeros[name] = torch.rand(parameter.shape, generator=generator) < 0.8
                parameter[zeros[name]] = 0
    save_sparse(model, tmp_path / "packed")
    folder, printed = finetune(tmp_path / "packed", keep_masks="true")
    assert "head for 10 classes kept; images of 8x8" in printed and "digits: 32 training" in printed
    after = load_sparse(folder)
    for name, parameter in after.named_parameters():
        if name in zeros:
            assert torch.equal(parameter == 0, zeros[name]), name
            assert not torch.equal(parameter, model.get_parameter(name))
    results = json.loads((folder / "results.json").read_text())
    assert results["sparsity"]["zeros"] == sum(int(mask.sum()) for mask in zeros.values())


def test_packed_models_get_no_new_head_but_advice(finetune, tmp_path):
    save_sparse(load_model(saved("timm", tmp_path / "dense", size=8))[0], tmp_path / "packed")
    with pytest.raises(SystemExit, match="error: .*has 3 classes, the data 10.*`tscnc unpack"):
        finetune(tmp_path / "packed")


def test_a_model_of_larger_images_and_other_classes_is_pruned(finetune, tmp_path):
    folder, printed = finetune(saved("convnext", tmp_path / "model"), target_sparsity=0.5)
    said = "new head for 10 classes in place of one for 3; images of 8x8, resized to 16x16 (bicubic) for the model"
    assert said in printed and "images of 3x8x8 in 10 classes" in printed
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert list(model.config.id2label.values()) == DIGITS
    results = json.loads((folder / "results.json").read_text())["sparsity"]
    assert results["zeros"] == round(0.5 * results["prunable"])


def test_what_cannot_be_found_ends_with_one_line(finetune, tmp_path):
    with pytest.raises(SystemExit, match="error: .*no-such-model"):
        finetune(tmp_path / "no-such-model")
    with pytest.raises(SystemExit, match="error: there is no folder '/no/such/data'"):
        finetune(saved("timm", tmp_path / "model"), dataset="/no/such/data")


def test_channels_that_the_model_does_not_take_are_refused(finetune, tmp_path):
    folder = saved("timm", tmp_path / "model")
    with pytest.raises(SystemExit, match="error: channels=grey but .*model takes rgb images: leave it out"):
        finetune(folder, channels="grey")
    with pytest.raises(SystemExit, match="error: there is no folder '/no/such/data'"):
        finetune(folder, channels="rgb", dataset="/no/such/data")
