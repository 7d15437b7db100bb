"""Runs that follow a teacher: which network it is, when, what is logged, resumed and refused."""

import json

import pytest
import torch

from tests.trainers import CLASS_NAMES
from tscnc_hf import TSCNCTrainer
from tscnc_hf.artifact.files.identity import weights_digest
from tscnc_hf.artifact.models.building import vit_from_config
from tscnc_hf.artifact.models.loading import logits_fn
from tscnc_hf.cli.recipe import dense_twin
from tscnc_hf.method.adversarial.distillation import distillation_term
from tscnc_hf.training.teacher import Teacher, teacher_digest


OPTIONS = {
    "objective": "pgd-at", "adversary": "pgd", "tsc_weight": 0.0, "cnc_weight": 0.0, "learning_rate": 5e-3,
    "num_train_epochs": 4, "per_device_train_batch_size": 16, "pruning_interval": 2, "logging_steps": 1,
    "pruning_start": 0.25, "distill_weight": 2.0, "distill_temperature": 3.0, "optim": "adamw_torch",
}  # fmt: skip
OWN = OPTIONS | {"teacher": "dense"}


class Watched(TSCNCTrainer):
    """Keeps what each step's loss was made of."""

    def objective(self, model, x, x_adv, y, taught=None):
        self.seen.append((self.state.global_step, x, x_adv, taught, [p.detach().clone() for p in model.parameters()]))
        return super().objective(model, x, x_adv, y, taught)


@pytest.fixture
def folder(build, tmp_path):
    """A dense network with another preprocessing than the pupil's, saved."""
    model, processor = build("vit", seed=3)
    processor.image_mean, processor.image_std = [0.1] * 3, [0.4] * 3
    for part in (model, processor):
        part.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def watch(trainer):
    trainer.__class__, trainer.seen = Watched, []
    return trainer


def test_a_loaded_teacher_is_followed_from_the_start_of_pruning(folder, build, make_trainer):
    """Its logits are those of its own preprocessing, in evaluation mode; the logged term is the formula's."""
    model, processor = build("resnet")
    trainer = watch(make_trainer((model, processor), teacher=str(folder), **OPTIONS))
    trainer.train()
    teacher, _ = build("vit", seed=3)
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    assert [step for step, _, _, taught, _ in trainer.seen if taught is not None] == list(range(4, 16))
    assert ["distill_loss" in logged[step] for step in range(1, 17)] == [False] * 4 + [True] * 12
    for _, x, _, taught, _ in trainer.seen[4:]:
        with torch.no_grad():
            torch.testing.assert_close(taught, teacher.eval()((x - 0.1) / 0.4).logits, rtol=1e-4, atol=1e-5)
    assert all(
        entry["loss"] == pytest.approx(entry["robust_loss"] + entry.get("distill_loss", 0.0), rel=1e-3)
        for entry in logged.values()
    )


def test_the_term_is_that_of_the_step(folder, build, make_trainer):
    options = OPTIONS | {"pruning_start": 0.0, "max_steps": 1, "pruning_end": 0.0}
    del options["pruning_interval"]  # there is one moment
    trainer = watch(make_trainer(build("vit"), teacher=str(folder), **options))
    trainer.train()
    _, x, x_adv, taught, weights = trainer.seen[0]
    pupil, processor = build("vit")
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(weights), pupil.parameters())
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    clean, adversarial = (pupil((part - mean) / std).logits for part in (x, x_adv))
    expected = 2.0 * distillation_term(clean, adversarial, taught, 3.0)
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["distill_loss"] == pytest.approx(expected.item(), rel=1e-3)


def test_a_sparse_model_that_is_fine_tuned_follows_it_throughout(folder, build, make_trainer):
    model, processor = build("vit")
    with torch.no_grad():
        model.classifier.weight[:, ::2] = 0
    options = OPTIONS | {"keep_masks": True, "target_sparsity": 0.0, "class_weights": "balanced"}
    trainer = make_trainer((model, processor), teacher=str(folder), max_steps=3, **options)
    trainer.train()
    assert sum("distill_loss" in entry for entry in trainer.state.log_history) == 3
    assert (model.classifier.weight[:, ::2] == 0).all()


@pytest.mark.parametrize("more", [{}, {"ema_decay": 0.8}, {"tsc_on": "gates", "tsc_weight": 1e-2}, {"bf16": True}])
def test_the_runs_own_dense_network_is_the_one_that_pruning_begins_with(more, build, make_trainer, watcher):
    dense = []

    def look(event, state, model):
        if state.global_step == 4:  # what an evaluation would see now
            with trainer.compressor.published() as published:
                dense.append({name: tensor.clone() for name, tensor in published.state_dict().items()})

    trainer = make_trainer(build("vit"), callbacks=[watcher(look)], **(OWN | more))
    trainer.train()
    teacher = {name.removeprefix("teacher."): tensor for name, tensor in trainer.teacher.state().items()}
    assert teacher.keys() == dense[0].keys()
    assert [name for name, tensor in teacher.items() if not torch.equal(tensor, dense[0][name])] == []
    assert all(bool(tensor.any()) for tensor in teacher.values() if tensor.ndim > 1)
    logged = [entry["distill_loss"] for entry in trainer.state.log_history if "distill_loss" in entry]
    assert len(logged) == 12 and min(logged) > 0
    assert not any(p.requires_grad for p in trainer.teacher._model.parameters())
    plain, processor = build("vit")  # what it computes is its own, not the pupil's, whatever accelerate has wrapped
    plain.load_state_dict(teacher)
    x = torch.rand(4, 3, 8, 8)
    expected = logits_fn(plain.eval(), processor)(x)
    tolerance = {"rtol": 0.05, "atol": 0.05} if "bf16" in more else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(trainer.teacher.logits(x), expected, **tolerance)
    assert (trainer.adversary.logits(trainer.model)(x) - expected).abs().max() > 0.1


def test_the_runs_own_network_may_keep_what_it_has_computed(build, make_trainer):
    model, processor = build("vit")
    model.classifier.register_forward_hook(lambda layer, inputs, outputs: setattr(model, "last_logits", outputs))
    trainer = make_trainer((model, processor), **OWN)
    trainer.train()
    assert sum("distill_loss" in entry for entry in trainer.state.log_history) == 12
    assert model.last_logits is not trainer.teacher._model.last_logits


def test_a_second_training_has_a_teacher_of_its_own(build, make_trainer):
    """As one that begins anew after running out of memory."""
    trainer, taught = make_trainer(build("vit"), **(OWN | {"num_train_epochs": 2, "pruning_start": 0.0})), []
    for _ in range(2):
        begun = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        trainer.train()
        taught.append(trainer.teacher.state())
        assert all(torch.equal(taught[-1][f"teacher.{name}"], tensor) for name, tensor in begun.items())
    assert any(not torch.equal(tensor, taught[1][name]) for name, tensor in taught[0].items())


@pytest.mark.parametrize(("step", "bf16"), [(3, False), (7, False), (7, True)])
def test_a_resumed_run_is_the_uncut_one(step, bf16, build, make_trainer, tmp_path):
    options = OWN | {"save_strategy": "steps", "save_steps": 1, "ema_decay": 0.9, "awp_gamma": 0.01, "bf16": bf16}
    options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}
    whole = make_trainer(build("vit", dropout=0.2), output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    cut = make_trainer(build("vit", seed=7, dropout=0.2), output_dir=str(tmp_path / "cut"), **options)
    cut.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    one, other = whole.model.state_dict(), cut.model.state_dict()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    teachers = [trainer.teacher.state() for trainer in (whole, cut)]
    assert all(torch.equal(tensor, teachers[1][name]) for name, tensor in teachers[0].items()) and teachers[0]


def test_a_teacher_is_known_by_its_weights(folder, build, make_trainer, tmp_path):
    options = OPTIONS | {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "pruning_interval": 1}
    trainer = make_trainer(build("vit"), teacher=str(folder), output_dir=str(tmp_path / "one"), **options)
    trainer.train()
    checkpoint = tmp_path / "one" / "checkpoint-2"
    identity = json.loads((checkpoint / "run_identity.json").read_text())
    model, processor = build("vit", seed=3)
    assert identity["options"]["teacher"] == weights_digest(model) == teacher_digest(str(folder))
    moved = folder.rename(tmp_path / "moved")
    again = make_trainer(build("vit"), teacher=str(moved), output_dir=str(tmp_path / "two"), **options)
    again.train(resume_from_checkpoint=str(checkpoint))
    with torch.no_grad():
        model.classifier.bias += 1
    for part in (model, processor):
        part.save_pretrained(tmp_path / "other")
    other = make_trainer(build("vit"), teacher=str(tmp_path / "other"), output_dir=str(tmp_path / "three"), **options)
    with pytest.raises(ValueError, match="was trained with teacher='"):
        other.train(resume_from_checkpoint=str(checkpoint))
    assert str(tmp_path) not in json.dumps(trainer.args.method_dict())


def test_what_cannot_teach_is_refused_before_training(build, make_trainer, make_config, tmp_path):
    def refused(message, model, processor, error=ValueError):
        for part in (model, processor):
            part.save_pretrained(tmp_path / "bad")
        with pytest.raises(error, match=message):
            make_trainer(build("vit"), teacher=str(tmp_path / "bad"), **OPTIONS)

    sizes = {"patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    refused(
        "has 7 classes and the model 10: give one of as many", *vit_from_config(CLASS_NAMES[:7], (8, 8), 3, **sizes)
    )
    words = [f"thing{'abcdefghij'[i]}" for i in range(10)]
    model, processor = vit_from_config(words, (8, 8), 3, **sizes)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "words")
    pupil, _ = vit_from_config([*words[1:], words[0]], (8, 8), 3, **sizes)
    with pytest.raises(ValueError, match="was trained for other classes .*thinga, .* or for these in another order"):
        Teacher(make_config(**OPTIONS, teacher=str(tmp_path / "words")), pupil, 10, None)
    model, processor = vit_from_config(sorted(map(str, range(12))), (8, 8), 3, **sizes)  # 0, 1, 10, 11, 2, ...
    for part in (model, processor):
        part.save_pretrained(tmp_path / "as text")
    pupil, _ = vit_from_config([f"LABEL_{number}" for number in range(12)], (8, 8), 3, **sizes)
    with pytest.raises(ValueError, match=r"for other classes \(0, 1, 10, 11, ...\) than the model \(LABEL_0, LABEL_1"):
        Teacher(make_config(**OPTIONS, teacher=str(tmp_path / "as text")), pupil, 12, None)
    refused("images of 3x8x8 do not go through teacher=", *vit_from_config(CLASS_NAMES, (8, 8), 1, **sizes))
    with pytest.raises(OSError):
        make_trainer(build("vit"), teacher=str(tmp_path / "nothing"), **OPTIONS)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"distill_weight": 1.0}, "distill_weight=1.0 needs a teacher: a folder, a Hub id or 'dense'"),
        (
            {"distill_weight": 1.0, "teacher": "dense", "keep_masks": True},
            "keep_masks=True it is sparse from the begin",
        ),
        ({"teacher": "dense"}, "teacher='dense' has no effect without distill_weight, and target_sparsity or"),
        ({"distill_temperature": 2.0}, "distill_temperature=2.0 has no effect without distill_weight"),
        (
            {"distill_weight": 1.0, "teacher": "dense", "target_sparsity": 0},
            "has no effect without distill_weight, and",
        ),
        ({"distill_weight": -1.0}, "distill_weight=-1.0 is outside"),
        ({"distill_temperature": 0.0}, "distill_temperature=0.0 is outside"),
    ],
)
def test_wrong_options(options, message, make_config):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def test_a_dense_twin_has_no_teacher(make_config):
    twin = dense_twin(make_config(**OWN))
    assert (twin.teacher, twin.distill_weight, twin.distill_temperature) == (None, 0.0, 1.0)
