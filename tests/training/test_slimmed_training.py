"""A slimmed model in training: what its config records survives, and its checkpoints are its own."""

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from tscnc_hf import TSCNCConfig, TSCNCTrainer, load_slim, slim


PROCESSOR = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def vit():
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, image_size=16, patch_size=8
    )
    config.num_labels = 5
    return ViTForImageClassification(config)


def test_training_keeps_the_recorded_widths(tmp_path):
    torch.manual_seed(0)
    model = vit()
    with torch.no_grad():
        model.vit.layers[0].mlp.fc2.weight[:, :11] = 0
        model.vit.layers[1].attention.o_proj.weight[:, 6:12] = 0
    small, report = slim(model)
    assert report.removed == 12 and report.config == "recorded"
    data = [{"pixel_values": torch.rand(3, 16, 16), "labels": index % 5} for index in range(8)]
    args = TSCNCConfig(
        str(tmp_path),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=4,
        attack_steps=1,
        use_cpu=True,
        target_sparsity=0.3,
        pruning_start=0.0,
        pruning_end=0.5,
        pruning_interval=1,
    )
    trainer = TSCNCTrainer(small, args, train_dataset=data, processing_class=PROCESSOR)
    trainer.train()
    trainer.save_model()
    again = load_slim(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), small.parameters(), strict=True))
    assert again.config.tscnc["target_sparsity"] == 0.3 and again.vit.layers[1].attention.num_attention_heads == 3

    resumed = TSCNCTrainer(load_slim(tmp_path), args, train_dataset=data, processing_class=PROCESSOR)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 2
    whole = TSCNCTrainer(vit(), args, train_dataset=data, processing_class=PROCESSOR)
    with pytest.raises(ValueError, match="of another shape"):
        whole.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
