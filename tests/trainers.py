"""Models of several kinds, each built anew on request, and trainers for a few steps."""

import pytest


CLASS_NAMES = [str(digit) for digit in range(10)]
SMALL_RESNET = {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]}
SMALL_TIMM_VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.fixture
def build():
    """`build(kind, seed=0, dropout=0.0)` -> (model, processor) with weights of their own."""
    import torch
    from transformers import ConvNextConfig, ConvNextForImageClassification, ViTImageProcessor

    from tscnc_hf.artifact.models.building import timm_model, vit_from_config

    def make(kind: str, seed: int = 0, dropout: float = 0.0):
        torch.manual_seed(seed)
        if kind == "vit":
            sizes = {"patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
            return vit_from_config(CLASS_NAMES, (8, 8), 3, **sizes, dropout=dropout)
        if kind == "resnet":
            return timm_model("resnet18", CLASS_NAMES, (8, 8), model_args=SMALL_RESNET)
        if kind == "resnet-stride-8":
            # "resnet" ends at 1 x 1 pixels, where oneDNN's bf16 gradient of a strided convolution reads memory that
            # nobody wrote
            return timm_model("resnet18", CLASS_NAMES, (8, 8), model_args=SMALL_RESNET | {"output_stride": 8})
        if kind == "timm-vit":
            return timm_model("vit_tiny_patch16_224", CLASS_NAMES, (8, 8), model_args=SMALL_TIMM_VIT)
        if kind == "mobilenet":
            return timm_model("mobilenetv3_small_050", CLASS_NAMES, (32, 32))
        if kind == "convnext":
            config = ConvNextConfig(
                image_size=8, patch_size=2, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10
            )
            return ConvNextForImageClassification(config), ViTImageProcessor(image_mean=[0.5], image_std=[0.25])
        raise KeyError(kind)

    return make


def never_collapsed(prediction) -> dict[str, float]:
    """A `compute_metrics` for short runs, whose networks name one class only: any evaluation may be the best one."""
    return {"collapsed": 0.0}


@pytest.fixture
def make_trainer(make_config, digits):
    """`make_trainer((model, processor), train=64, callbacks=(), **options of TSCNCConfig)`; 32 images evaluate."""
    from tscnc_hf.training.trainer import TSCNCTrainer

    def make(pair, train=64, evaluate=32, callbacks=(), compute_metrics=None, **options):
        model, processor = pair
        if isinstance(train, int):
            train = digits.train.subset(range(train))
        if isinstance(evaluate, int):
            evaluate = digits.validation.subset(range(evaluate))
        return TSCNCTrainer(
            model=model,
            args=make_config(**options),
            train_dataset=train,
            eval_dataset=evaluate,
            processing_class=processor,
            callbacks=list(callbacks),
            compute_metrics=compute_metrics,
        )

    return make


@pytest.fixture
def watcher():
    """`watcher(look, events)`: a callback that calls `look(event, state, model)`, after those before it."""
    from transformers import TrainerCallback

    def listener(event, look):
        return lambda args, state, control, model=None, **kwargs: look(event, state, model)

    def make(look, events=("on_step_end",)):
        callback = TrainerCallback()
        for event in events:
            setattr(callback, event, listener(event, look))
        return callback

    return make
