"""What the Trainer is made of, and which of upstream's private doors it uses."""

import inspect

import pytest
from transformers import Trainer

from tscnc_hf import TSCNCTrainer
from tscnc_hf.training.adversary import Adversary
from tscnc_hf.training.compressor import Compressor
from tscnc_hf.training.publisher import Publisher
from tscnc_hf.training.resume.resumable import ResumableTrainer


# Private methods of `Trainer` that ours override, with the parameters that upstream gives them. Where this fails for a
# new version of transformers, read what upstream does there now, mend the override, and write the new parameters here.
HOOKS = {
    "_clip_grad_norm": ["self", "model"],
    "_determine_best_metric": ["self", "metrics", "trial"],
    "_finish_current_push": ["self"],
    "_get_dataloader": [
        "self",
        "dataset",
        "description",
        "batch_size",
        "sampler_fn",
        "is_training",
        "dataloader_key",
    ],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_get_output_dir": ["self", "trial"],
    "_init_training_state": [
        "self",
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ],
    "_inner_training_loop": [
        "self",
        "batch_size",
        "args",
        "resume_from_checkpoint",
        "trial",
        "ignore_keys_for_eval",
    ],
    "_load_best_model": ["self"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_rng_state": ["self", "checkpoint"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "_run_epoch": [
        "self",
        "model",
        "epoch",
        "train_dataloader",
        "steps_in_epoch",
        "num_update_steps_per_epoch",
        "trial",
        "ignore_keys_for_eval",
        "start_time",
        "resume_from_checkpoint",
        "epochs_trained",
        "steps_trained_in_current_epoch",
    ],
    "_save": ["self", "output_dir", "state_dict"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
}
OURS = (ResumableTrainer, TSCNCTrainer)


def test_it_is_one_trainer_over_one():
    assert TSCNCTrainer.__mro__ == (TSCNCTrainer, ResumableTrainer, Trainer, object)


def test_it_holds_what_does_the_work(build, make_trainer):
    trainer = make_trainer(build("vit"))
    assert isinstance(trainer.adversary, Adversary)
    assert isinstance(trainer.compressor, Compressor)
    assert isinstance(trainer.publisher, Publisher)


def test_every_private_hook_of_upstream_that_is_overridden_is_named():
    overridden = {name for one in OURS for name in vars(one) if name.startswith("_") and hasattr(Trainer, name)}
    assert {name for name in overridden if not name.startswith("__")} == HOOKS.keys()


@pytest.mark.parametrize("name", HOOKS)
def test_upstream_has_not_changed_a_hook(name):
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == HOOKS[name], name


@pytest.mark.parametrize("name", HOOKS)
def test_an_override_takes_what_upstream_gives(name):
    for one in OURS:
        if name in vars(one):
            assert list(inspect.signature(vars(one)[name]).parameters) == HOOKS[name], one
