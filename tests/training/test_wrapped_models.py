"""Models that come wrapped, tied, in odd memory, or in parts: what is saved is what was trained, or it is refused."""

import copy
import sys
import types

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification, ViTImageProcessor

from tscnc_hf import load_sparse, save_sparse, sparsity_report
from tscnc_hf.artifact.models.saving import disk_state
from tscnc_hf.evaluation.measures.robustness import evaluate_robustness
from tscnc_hf.method.wrappers import unwrap_, unwrapped


PIXELS = ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3)
OPTIONS = {"max_steps": 2, "objective": "natural", "adversary": "none", "eval_attack_steps": 0, "target_sparsity": 0.5}
OPTIONS |= {"pruning_start": 0, "pruning_end": 0.5, "save_strategy": "steps", "save_steps": 1}


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_inside(model):
    model.vit.layers[0].mlp = compiled(model.vit.layers[0].mlp)
    model.classifier = compiled(model.classifier)
    return model


WRAPPED = {
    "compiled": compiled,
    "compiled inside": compiled_inside,
    "parallel": nn.DataParallel,
    "both": lambda model: compiled(nn.DataParallel(compiled_inside(model))),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_model_is_saved_under_its_own_names(name, build, make_trainer, tmp_path, caplog):
    model, processor = build("vit")
    with caplog.at_level("WARNING"):
        trainer = make_trainer((WRAPPED[name](model), processor), **OPTIONS)
    assert trainer.model is model and "Trained as the plain module inside" in caplog.text
    trainer.train()
    trainer.save_model()
    stored = AutoModelForImageClassification.from_pretrained(tmp_path / "out").state_dict()
    packed = load_sparse(tmp_path / "out").state_dict()
    assert not any("_orig_mod" in name or "module." in name for name in stored)
    for key, tensor in model.state_dict().items():
        assert torch.equal(stored[key], tensor) and torch.equal(packed[key], tensor)
    plain = make_trainer(build("vit"), output_dir=str(tmp_path / "plain"), **OPTIONS)
    plain.train()
    assert all(torch.equal(tensor, stored[key]) for key, tensor in plain.model.state_dict().items())


def test_wrappers_are_seen_through_elsewhere(build, digits, tmp_path):
    model, processor = build("vit")
    for wrap in (compiled, nn.DataParallel):
        wrapped = wrap(model)
        assert unwrapped(wrapped) is model
        assert sparsity_report(wrapped, ["classifier.weight"]) == sparsity_report(model, ["classifier.weight"])
        report = evaluate_robustness(wrapped, digits.test.subset(range(4)), ["clean"], processing_class=processor)
        assert (
            report["clean"]
            == evaluate_robustness(model, digits.test.subset(range(4)), ["clean"], processing_class=processor)["clean"]
        )
    save_sparse(compiled(model), tmp_path)
    assert load_sparse(tmp_path).state_dict().keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="keys are those of a compiled module"):
        save_sparse(compiled_inside(model), tmp_path / "inside")
    model, names = unwrap_(model)
    assert sorted(names) == ["classifier", "vit.layers.0.mlp"] and unwrap_(model)[1] == []


class Net(nn.Module):
    """A plain module; `odd` makes its parameters awkward to save."""

    def __init__(self, odd=lambda net: None):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 10)
        odd(self)

    def forward(self, x):
        return self.head(self.other(self.one(self.body(x).mean((2, 3)))))


def tied(net):
    net.other.weight = net.one.weight


def tied_modules(net):
    net.other = net.one


def transposed(net):
    net.one.weight = nn.Parameter(net.one.weight.detach().t().contiguous().t())


def views(net):
    together = torch.randn(16, 8)
    net.one.weight, net.other.weight = nn.Parameter(together[:8]), nn.Parameter(together[8:])


def view_of_larger(net):
    net.one.weight = nn.Parameter(torch.randn(64, 8)[8:16])


@pytest.mark.parametrize("odd", [lambda net: None, tied, tied_modules, transposed, views, view_of_larger])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_plain_module_in_any_memory_is_saved_and_resumed(odd, channels_last, make_trainer, tmp_path):
    options = OPTIONS | {"channels_last": channels_last}
    trainer = make_trainer((Net(odd), PIXELS), output_dir=str(tmp_path / "a"), **options)
    trainer.train()
    trainer.save_model()
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert stored.keys() == trainer.model.state_dict().keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in trainer.model.state_dict().items())
    Net().load_state_dict(stored)  # with torch alone
    again = make_trainer((Net(odd), PIXELS), output_dir=str(tmp_path / "b"), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)


def prototypes(net):
    net.classes = nn.Parameter(torch.randn(10, 8))
    net.head.weight = net.classes


def test_a_weight_that_is_also_a_parameter_of_the_model_is_pruned_averaged_and_decays(make_trainer):
    options = OPTIONS | {"ema_decay": 0.9, "weight_decay": 0.1, "save_strategy": "no"}
    trainer = make_trainer((Net(prototypes), PIXELS), **options)
    assert "classes" in trainer.get_decay_parameter_names(trainer.model)
    trainer.train()
    assert (trainer.model.classes == 0).sum() == (trainer.compressor.pruner.masks["head.weight"] == 0).sum() > 0
    kept = make_trainer((Net(prototypes), PIXELS), **(options | {"pruning_dense_last": True}))
    kept.train()
    assert (kept.model.classes != 0).all() and "head.weight" not in kept.compressor.pruner.records


def test_a_plain_module_needs_no_config_for_smoothed_labels(make_trainer):
    losses, options = [], OPTIONS | {"logging_steps": 1, "save_strategy": "no"}
    for smoothing in (0.0, 0.2):
        trainer = make_trainer((Net(), PIXELS), **options, label_smoothing_factor=smoothing)
        assert trainer.args.label_smoothing_factor == smoothing
        trainer.train()
        losses.append(trainer.state.log_history[0]["natural_loss"])
    assert losses[1] > losses[0] > 0


@pytest.mark.parametrize("option", ["activation_checkpointing", "gradient_checkpointing"])
def test_a_plain_module_that_cannot_recompute_is_told_so_before_training(option, make_trainer, make_config):
    if not hasattr(make_config(), option):
        pytest.skip(f"this transformers has no {option}")
    with pytest.raises(ValueError, match="_checkpointing=True, and Net has no method .*set_grad_checkpointing"):
        make_trainer((Net(), PIXELS), **(OPTIONS | {option: True}))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_ties_that_a_model_does_not_declare(kind, build, make_trainer, tmp_path):
    model, processor = build(kind)
    if kind == "vit":
        model.vit.layers[1].mlp.fc1.weight = model.vit.layers[0].mlp.fc1.weight
        model.vit.layers[0].mlp.fc2.weight.data = model.vit.layers[0].mlp.fc2.weight.data.t().contiguous().t()
    else:
        model.timm_model.layer2[0].conv2.weight = model.timm_model.layer1[0].conv2.weight
    trainer = make_trainer((model, processor), **OPTIONS)
    trainer.train()
    trainer.save_model()
    for loaded in (AutoModelForImageClassification.from_pretrained(tmp_path / "out"), load_sparse(tmp_path / "out")):
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_what_needs_no_copy_is_left_to_transformers(build):
    model, _ = build("vit")
    assert disk_state(model) is None
    state = model.state_dict()
    assert disk_state(model, state) is state


class Factors(nn.Module):
    """With the marks of a layer of PEFT's."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.lora_A = layer, nn.Linear(layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def named(name, base=nn.Module):
    return type(name, (base,), {})


def with_layer(model):
    model.classifier = type("Linear", (Factors, named("BaseTunerLayer")), {})(model.classifier)
    return model


def with_wrapper(model):
    wrapper = named("PeftModel")()
    wrapper.base_model, wrapper.config = model, model.config
    return wrapper


def with_own_adapter(model):
    model._hf_peft_config_loaded = True
    return model


def with_adapters_library(model):
    model.adapters_config = types.SimpleNamespace(adapters={})
    return model


@pytest.mark.parametrize("adapt", [with_layer, with_wrapper, with_own_adapter, with_adapters_library])
def test_a_model_that_saves_only_an_adapter_is_refused(adapt, build, make_trainer, tmp_path):
    model, processor = build("vit")
    adapted = adapt(model)
    with pytest.raises(ValueError, match="the adapter alone saved.*merge_and_unload"):
        make_trainer((adapted, processor), **OPTIONS)
    with pytest.raises(ValueError):
        save_sparse(adapted, tmp_path)
    assert "peft" not in sys.modules


def test_quantised_weights_and_parts_are_refused(build, make_trainer):
    model, processor = build("vit")
    weight = (model.classifier.weight.detach() * 127).to(torch.int8)
    model.classifier.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=r"quantised \(classifier.weight\)"):
        make_trainer((model, processor), **OPTIONS)
    model, processor = build("vit")
    model.is_quantized = True
    with pytest.raises(ValueError, match="quantised"):
        make_trainer((model, processor), **OPTIONS)
    model, processor = build("vit")
    model.classifier.weight = nn.Parameter(torch.ones(10, 1).expand(10, 32))
    with pytest.raises(ValueError, match=r"classifier.weight is expanded"):
        make_trainer((model, processor), **OPTIONS)
    model, processor = build("vit")
    model.register_state_dict_post_hook(lambda module, state, *args: [state.pop("classifier.bias")].clear())
    with pytest.raises(ValueError, match="leaves out classifier.bias"):
        make_trainer((copy.copy(model), processor), **OPTIONS)
