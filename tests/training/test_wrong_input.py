"""Wrong input ends early, with the value given and what is allowed in the message."""

import re

import datasets
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback, TrainingArguments, ViTImageProcessor

from tscnc_hf.data.batches import collate
from tscnc_hf.data.image_datasets import ImageTensorDataset
from tscnc_hf.method.criteria import _CRITERIA, find_criterion, register_criterion
from tscnc_hf.training.checks import check_labels
from tscnc_hf.training.trainer import TSCNCTrainer


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"epsilon": 8}, ["epsilon=8 ", "[0, 1]", 'epsilon="8/255"']),
        ({"epsilon": "8"}, ["epsilon=8 ", 'epsilon="8/255"']),
        ({"epsilon": -0.1}, ["epsilon=-0.1", "[0, 1]"]),
        ({"epsilon": "abc"}, ["epsilon='abc'", "8/255"]),
        ({"epsilon": "8/0"}, ["epsilon='8/0'", "8/255"]),
        ({"epsilon": float("nan")}, ["epsilon=nan", "[0, 1]"]),
        ({"attack_step_size": 2}, ["attack_step_size=2 ", 'attack_step_size="2/255"']),
        ({"attack_steps": 0}, ["attack_steps=0", "[1, infinity)"]),
        ({"epsilon_warmup": 1.5}, ["epsilon_warmup=1.5", "[0, 1]"]),
        ({"objective": "natural", "epsilon_warmup": 0.5}, ["epsilon_warmup=0.5", 'objective other than "natural"']),
        ({"objective": "natural", "attack_steps": 7}, ["attack_steps=7", 'objective other than "natural"']),
        ({"objective": "natural", "attack_step_size": 0.01}, ["attack_step_size", 'objective other than "natural"']),
        ({"trades_beta": -1}, ["trades_beta=-1", "[0, infinity)"]),
        ({"eval_attack_steps": -1}, ["eval_attack_steps=-1"]),
        ({"tsc_weight": -1e-3}, ["tsc_weight=-0.001", "[0, infinity)"]),
        ({"tsc_weight": float("nan")}, ["tsc_weight=nan"]),
        ({"cnc_weight": -1}, ["cnc_weight=-1", "[0, infinity)"]),
        ({"tsc_a": 0}, ["tsc_a=0", "(0, infinity)"]),
        ({"cnc_ridge": 0}, ["cnc_ridge=0", "(0, infinity)"]),
        ({"target_sparsity": 1.0}, ["target_sparsity=1.0", "[0, 1)"]),
        ({"num_train_epochs": 0}, ["num_train_epochs=0 ", "max_steps=-1", "nothing would be trained"]),
        ({"num_train_epochs": -1, "max_steps": 0}, ["num_train_epochs=-1 ", "max_steps=0"]),
        ({"gradient_accumulation_steps": 0}, ["gradient_accumulation_steps=0", "[1, infinity)"]),
        ({"gradient_accumulation_steps": -1}, ["gradient_accumulation_steps=-1"]),
        ({"per_device_train_batch_size": 0}, ["per_device_train_batch_size=0", "[1, infinity)"]),
        ({"per_device_eval_batch_size": -1}, ["per_device_eval_batch_size=-1"]),
        ({"label_smoothing_factor": 1.5}, ["label_smoothing_factor=1.5", "[0, 1)"]),
        ({"label_smoothing_factor": -0.1}, ["label_smoothing_factor=-0.1"]),
        ({"learning_rate": -1e-3}, ["learning_rate=-0.001", "[0, infinity)"]),
        ({"weight_decay": -0.1}, ["weight_decay=-0.1"]),
        ({"max_grad_norm": -1}, ["max_grad_norm=-1"]),
        ({"dataloader_num_workers": -1}, ["dataloader_num_workers=-1"]),
        ({"adam_beta2": 1.0}, ["adam_beta2=1.0", "[0, 1)"]),
        ({"target_sparsity": -0.1}, ["target_sparsity=-0.1", "[0, 1)"]),
        ({"target_sparsity": 1.5}, ["target_sparsity=1.5", "[0, 1)"]),
        ({"pruning_start": 0.6, "pruning_end": 0.4}, ["pruning_end=0.4", "pruning_start=0.6", "start first"]),
        ({"target_sparsity": "90%"}, ["target_sparsity='90%' is a str", "number"]),
        ({"pruning_start": -0.1}, ["pruning_start=-0.1", "[0, 1]"]),
        ({"pruning_end": 1.1}, ["pruning_end=1.1", "[0, 1]"]),
        ({"pruning_interval": 0}, ["pruning_interval=0", "[1, infinity)"]),
        ({"pruning_exclude": "head"}, ["pruning_exclude='head'", "list"]),
        ({"adversary": "cw"}, ["adversary='cw'", "none, fgsm-rs, n-fgsm, pgd, cw-pgd, kl-pgd"]),
        ({"objective": "gairat"}, ["objective='gairat'", "natural, pgd-at, trades, mart"]),
        ({"pruning_scope": "block"}, ["pruning_scope='block'", "global, uniform, erk, learned"]),
        ({"pruning_schedule": "cosine"}, ["pruning_schedule='cosine'", "cubic, linear, one-shot"]),
        ({"pruning_structure": "4:2"}, ["pruning_structure='4:2'", "keeps 4 of 2"]),
        ({"pruning_structure": "rows"}, ["pruning_structure='rows'", "unstructured", "2:4"]),
        ({"pruning_structure": "heads", "pruning_scope": "erk"}, ["pruning_scope='erk'", "global, uniform, learned"]),
        ({"pruning_structure": "heads", "pruning_row_floor": 1}, ["pruning_row_floor=1", "single weights"]),
        ({"pruning_layer_sparsity": {"head": 1.5}}, ["'head'=1.5", "[0, 1]"]),
        ({"pruning_layer_sparsity": "head: 0.5"}, ["'head: 0.5' is not JSON"]),
        ({"pruning_layer_floor": 1.0}, ["pruning_layer_floor=1.0", "[0, 1)"]),
        ({"pruning_row_floor": -1}, ["pruning_row_floor=-1", "[0, infinity)"]),
        (
            {"pruning_criterion": "learned", "pruning_start": 0.5, "pruning_end": 0.5},
            ["pruning_criterion='learned'", "let pruning_end be later"],
        ),
        ({"pruning_criterion": "random"}, ["pruning_criterion='random'", "magnitude"]),
        ({"adversary": "none", "objective": "trades"}, ["objective='trades'", "adversary='pgd' or 'kl-pgd'"]),
        ({"adversary": "none", "objective": "pgd-at"}, ["objective='pgd-at'", "adversary"]),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_an_option_out_of_range(options, parts, make_config):
    with pytest.raises(ValueError) as caught:
        make_config(**options)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("value", ["8/255", 8 / 255, "0.03137254901960784"])
def test_the_ways_to_write_epsilon(value, make_config):
    assert make_config(epsilon=value).epsilon == pytest.approx(8 / 255, rel=1e-12)


def test_deepspeed_is_refused(make_config, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)  # upstream's would import deepspeed
    instead = "deepspeed is not supported.*Use DDP .*accelerate/ddp.yaml.*or FSDP2 .*accelerate/fsdp2.yaml"
    for stage in (1, 2, 3):
        with pytest.raises(ValueError, match=instead):
            make_config(deepspeed={"zero_optimization": {"stage": stage}})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # what `accelerate launch` says to the processes
    with pytest.raises(ValueError, match=instead):
        make_config()


def assert_no_step(trainer, options_error: str) -> None:
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=options_error):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_training_too_short_for_the_schedule(build, make_trainer):
    trainer = make_trainer(build("vit"), pruning_interval=10)  # four steps
    assert_no_step(trainer, "4 optimizer steps.*0.25 to 0.75.*has 2.*pruning_interval=10.*Train longer")


def test_the_shortest_schedule_that_fits_trains(build, make_trainer):
    trainer = make_trainer(build("vit"), pruning_interval=2)
    trainer.train()
    assert trainer.compressor.pruner.pruned_count == trainer.compressor.pruner.target_count(0.9)


def test_a_run_that_is_ended_early_says_what_it_has_not_reached(build, make_trainer, caplog):
    class End(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    options = {"max_steps": 8, "pruning_start": 0.0, "pruning_end": 0.9, "pruning_interval": 1}
    trainer = make_trainer(build("vit"), **options)
    trainer.add_callback(End())
    trainer.train()
    assert "training was ended after step 5 of 8 with" in caplog.text and "target_sparsity is 90.00%" in caplog.text


def test_a_training_that_is_refused_leaves_the_results(build, make_trainer, digits):
    trainer = make_trainer(build("vit"), save_strategy="no", max_steps=4, pruning_interval=1)
    trainer.train()
    results = trainer.test(digits.test.subset(range(8)), attacks=("clean",), full=False)
    count = trainer.compressor.pruner.pruned_count
    with pytest.raises(ValueError, match="no whole checkpoint to resume from"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.publisher.results is results and trainer.compressor.pruner.pruned_count == count > 0


def test_an_optimizer_with_other_weights_for_evaluation_is_refused(build, make_config, digits):
    class ScheduleFree(torch.optim.SGD):
        def eval(self):
            """Puts other weights in place."""

    given = {"train_dataset": digits.train.subset(range(64))}
    for options, refused in (({}, True), ({"target_sparsity": 0.0, "pruning_interval": 100}, False)):
        model, processor = build("vit")
        optimizers = (ScheduleFree(model.parameters(), lr=0.1), None)
        trainer = TSCNCTrainer(
            model, make_config(max_steps=4, **options), **given, processing_class=processor, optimizers=optimizers
        )
        if refused:
            assert_no_step(trainer, "ScheduleFree has other weights for evaluation than for training")
        else:
            trainer.train()


@pytest.mark.parametrize(("end", "left"), [(0.5, "checkpoint-4"), (0.625, "the last weights")])
def test_a_best_step_that_was_not_saved_is_said(end, left, build, make_trainer, caplog):
    """Evaluated twice as often as saved; the best one is the last evaluation but one."""

    def mine(predictions):
        return {"mine": {6: 0.9}.get(trainer.state.global_step, 0.1), "collapsed": False}

    trainer = make_trainer(
        build("vit"), compute_metrics=mine, max_steps=8, pruning_start=0, pruning_end=end,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=4,
        load_best_model_at_end=True, metric_for_best_model="mine",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 6
    assert f"the best evaluation was after step 6, which was not saved: this is {left}. Let" in caplog.text
    assert "no evaluation came after" not in caplog.text


def test_an_optimizer_that_was_made_before_the_gates_is_refused(build, make_config, digits):
    model, processor = build("vit")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    given = {"train_dataset": digits.train.subset(range(64)), "processing_class": processor}
    config = make_config(tsc_on="gates")
    trainer = TSCNCTrainer(model, config, **given, optimizers=(optimizer, None))
    assert_no_step(trainer, "would not train them: give optimizer_cls_and_kwargs")
    made_here = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 1e-3})}
    TSCNCTrainer(build("vit")[0], config, **given, **made_here).train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scores: dict(list(scores.items())[1:]), "criterion 'own' gives .* None; a score for each"),
        (
            lambda scores: {name: score.flatten(1).sum(1) for name, score in scores.items()},
            "'own' gives .* scores of shape",
        ),
        (lambda scores: list(scores.values()), "'own' returns a list"),
    ],
)
def test_scores_of_an_own_criterion_that_do_not_fit(change, message, build, make_trainer, monkeypatch):
    monkeypatch.setattr("tscnc_hf.method.criteria._CRITERIA", dict(_CRITERIA))
    register_criterion("own", lambda matrices, gradients: change(find_criterion("magnitude").score(matrices, None)))
    with pytest.raises(ValueError, match=message):
        make_trainer(build("vit"), pruning_criterion="own")


# ---- data ----


def test_a_head_that_its_config_does_not_know_of(build, make_trainer):
    model, processor = build("vit")
    model.classifier = torch.nn.Linear(model.classifier.in_features, 12)
    with pytest.raises(ValueError, match="returns 12 numbers of an image, and its config says num_labels=10"):
        make_trainer((model, processor))


@pytest.mark.parametrize(
    "change", [lambda y: y.int(), lambda y: torch.nn.functional.one_hot(y, 10), lambda y: y[:, None]]
)
def test_labels_of_an_own_collator_that_no_loss_takes(change, build, make_config, digits):
    def own(items):
        batch = collate(items)
        return batch | {"labels": change(batch["labels"])}

    with pytest.raises(ValueError, match="class ids are int64 of shape"):
        model, processor = build("vit")
        options = {"data_collator": own, "train_dataset": digits.train, "processing_class": processor}
        TSCNCTrainer(model, make_config(), **options)


def items(**changes) -> list[dict]:
    item = {"pixel_values": torch.rand(3, 8, 8), "labels": 1} | changes
    return [{name: value for name, value in item.items() if value is not None}] * 4


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ([], ["empty", "at least one"]),
        (items(labels=10), ["from 10 to 10", "10 outputs", "0 .. 9"]),
        (items()[:3] + items(labels=-1)[:1], ["from -1 to 1", "0 .. 9"]),
        (items(labels=None), ["neither 'labels' nor 'label'", "pixel_values"]),
        (items(pixel_values=None, image=torch.rand(3, 8, 8)), ["no 'pixel_values'", "image"]),
        (items(pixel_values=torch.rand(3, 8, 8) * 2 - 1.5), ["[-1.", "allowed is [0, 1]", "Normalised"]),
        (items(pixel_values=torch.rand(3, 8, 8) * 255), ["allowed is [0, 1]", "255"]),
        (items(pixel_values=torch.full((3, 8, 8), float("nan"))), ["nan", "[0, 1]"]),
        (items(pixel_values=torch.rand(1, 8, 8)), ["1 channels", "takes 3"]),
        (items(labels=torch.tensor(0.5)), ["float", "integer class ids"]),
    ],
    ids=["empty", "label 10", "label -1", "no labels", "no pixels", "normalised", "0-255", "nan", "grey", "soft"],
)
@pytest.mark.parametrize("role", ["train_dataset", "eval_dataset"])
def test_wrong_data(role, data, parts, build, make_config, digits):
    model, processor = build("vit")
    sets = {"train_dataset": digits.train, "eval_dataset": digits.validation, role: data}
    with pytest.raises(ValueError) as caught:
        TSCNCTrainer(model, make_config(), processing_class=processor, **sets)
    for part in [role, *parts]:
        assert part in str(caught.value)


def test_wrong_labels_are_found_wherever_they_are(build, make_config):
    labels = torch.zeros(50, dtype=torch.int64)
    labels[49] = 11
    own = ImageTensorDataset(torch.zeros(50, 3, 8, 8, dtype=torch.uint8), labels, [str(i) for i in range(12)])
    table = Dataset.from_dict({"pixel_values": torch.zeros(50, 3, 8, 8).numpy(), "label": labels.numpy()})
    for data in (own, table, {"first": own.subset(range(10)), "second": own}):
        model, processor = build("resnet")
        with pytest.raises(ValueError, match="from 0 to 11, but the model has 10 outputs"):
            TSCNCTrainer(model, make_config(), eval_dataset=data, processing_class=processor)


def test_channels_of_a_timm_model(build, make_config):
    model, processor = build("resnet")
    data = items(pixel_values=torch.rand(1, 8, 8))
    with pytest.raises(ValueError, match="1 channels, the model takes 3"):
        TSCNCTrainer(model, make_config(), train_dataset=data, processing_class=processor)


def test_pixels_that_turn_wrong_later_stop_before_the_step_that_reads_them(build, make_config):
    model, processor = build("vit")
    data = items() * 8 + items(pixel_values=torch.rand(3, 8, 8) * 3) * 8
    args = make_config(target_sparsity=0, per_device_train_batch_size=64)
    trainer = TSCNCTrainer(model, args, train_dataset=data, processing_class=processor)
    assert_no_step(trainer, r"allowed is \[0, 1\]")


# ---- models and arguments ----


def test_a_model_with_nothing_to_prune(make_config):
    processor = ViTImageProcessor(image_mean=[0.5], image_std=[0.25])
    with pytest.raises(ValueError, match="nothing to prune: no Linear or convolution"):
        TSCNCTrainer(nn.Sequential(nn.Flatten(), nn.LayerNorm(192)), make_config(), processing_class=processor)


def test_everything_excluded(build, make_trainer):
    with pytest.raises(ValueError, match="nothing to prune"):
        make_trainer(build("vit"), pruning_exclude=["weight"])


def test_excluding_what_is_not_there(build, make_trainer):
    with pytest.raises(ValueError, match="pruning_exclude names 'nosuch', which no parameter has in its name"):
        make_trainer(build("vit"), pruning_exclude=["classifier", "nosuch"])


def test_pairs_instead_of_dicts(build, make_config):
    model, processor = build("vit")
    pairs = torch.utils.data.TensorDataset(torch.rand(8, 3, 8, 8), torch.arange(8))
    with pytest.raises(ValueError, match="train_dataset: a batch item is a tuple; give a dict with pixel_values"):
        TSCNCTrainer(model, make_config(), None, pairs, processing_class=processor)


def test_a_normalisation_that_nobody_tells(build, make_config):
    model, _ = build("vit")
    with pytest.raises(ValueError, match="ViTForImageClassification normalises.*image_mean and image_std"):
        TSCNCTrainer(model, make_config())


def test_arguments_of_another_class(build, tmp_path):
    model, processor = build("vit")
    with pytest.raises(TypeError, match="TrainingArguments; TSCNCTrainer needs a TSCNCConfig"):
        TSCNCTrainer(model, TrainingArguments(str(tmp_path)), processing_class=processor)


def test_no_model_and_functions_that_make_one(build, make_config):
    model, processor = build("vit")
    with pytest.raises(ValueError, match="model is missing"):
        TSCNCTrainer(args=make_config())
    for name in ("model_init", "compute_loss_func"):
        with pytest.raises(ValueError, match=re.escape("model_init and compute_loss_func are not supported")):
            TSCNCTrainer(model, make_config(), processing_class=processor, **{name: lambda *args: model})


def test_check_labels():
    listed = [{"labels": 2, "pixel_values": None}, {"labels": 0, "pixel_values": None}]
    rows = datasets.Dataset.from_dict({"label": [0, 2]})
    for given in (
        ImageTensorDataset(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 2, 1]), list("abc")),
        [0, 2, 1],
        torch.tensor([2]),
        listed,
        rows,
    ):
        check_labels(given, 3)
        with pytest.raises(ValueError, match="from [02] to 2, but the model has 2 outputs"):
            check_labels(given, 2)
    with pytest.raises(ValueError, match="from -1"):
        check_labels([-1, 0], 3)
    with pytest.raises(ValueError, match="empty"):
        check_labels([], 3)
    with pytest.raises(TypeError, match="dict"):
        check_labels({"a": 1}, 3)
