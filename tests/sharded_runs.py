"""
Runs of `TSCNCTrainer` whose weights FSDP2 shards over the processes of `accelerate launch`, on CPUs; and the same runs
on one process. As a script: `accelerate launch --config_file recipes/accelerate/fsdp2.yaml sharded_runs.py FOLDER`.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from tscnc_hf.artifact.models.building import vit_from_config
from tscnc_hf.data.loading import load_image_data
from tscnc_hf.method.matrices import full_tensor
from tscnc_hf.training.config import TSCNCConfig
from tscnc_hf.training.trainer import TSCNCTrainer


EVERY_TERM = {
    "max_steps": 8,
    "optim": "sgd",  # adaptive optimizers blow rounding errors up where the true gradient is zero, as of key biases
    "learning_rate": 0.1,
    "weight_decay": 0.01,
    "max_grad_norm": 2.0,
    "objective": "trades",
    "adversary": "kl-pgd",
    "epsilon": 0.1,
    "attack_steps": 2,
    "tsc_weight": 1e-5,
    "cnc_weight": 1e-2,
    "target_sparsity": 0.8,
    "pruning_interval": 1,
    "ema_decay": 0.9,
    "eval_attack_steps": 2,
    "per_device_eval_batch_size": 8,
    "logging_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 4,  # within the schedule
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}
GATES = {"tsc_on": "gates", "tsc_weight": 1e-2, "pruning_criterion": "learned"}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "robust_accuracy", "eval_steps": 2}
BEST |= {"save_strategy": "steps", "save_steps": 2}
SAVING = {"optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 5}
TAUGHT = {"teacher": "dense", "distill_weight": 1.0}
REGROWN = {"regrow_fraction": 0.4, "regrow_interval": 1}
PUSHING = {"push_to_hub": True, "hub_model_id": "tester/shared", "hub_strategy": "checkpoint"}
REPOSITORY = PUSHING["hub_model_id"]
CASES = {  # with the micro-batches in which each process takes its share of 8 images
    # an evaluation right before latent weights are copied, with no average or checkpoint that would shard weights anew
    "weights": (EVERY_TERM | REGROWN | {"ema_decay": 0.0, "eval_steps": 2, "pruning_latent": True}, 1),
    "gates": (EVERY_TERM | GATES | BEST | {"activation_checkpointing": True}, 2),
    # its checkpoint is of the time when scores are learned
    "adamw": (EVERY_TERM | GATES | SAVING | TAUGHT | {"bf16": True, "eval_on_start": True}, 1),
}
CUT = "checkpoint-5"


def run_on_cpus() -> None:
    """
    accelerate shards on accelerators only, and would take DistributedDataParallel on CPUs without a word: let it take
    the processes for those of one while it decides.
    """
    import accelerate.state as state

    decide = state.AcceleratorState.__init__

    def decide_as_on_an_accelerator(self, *args, **kwargs):
        if not state.PartialState._shared_state:
            state.PartialState(cpu=True)
        shared = state.PartialState._shared_state
        if shared["distributed_type"] != state.DistributedType.MULTI_CPU:
            return decide(self, *args, **kwargs)
        shared["distributed_type"] = state.DistributedType.MULTI_XPU
        try:
            return decide(self, *args, **kwargs)
        finally:
            if shared["distributed_type"] == state.DistributedType.MULTI_XPU:
                shared["distributed_type"] = state.DistributedType.MULTI_CPU

    state.AcceleratorState.__init__ = decide_as_on_an_accelerator


class Watch(TrainerCallback):
    """After each optimizer step: pruned weights are zero, in this process's part too. The weights after the last."""

    def __init__(self):
        self.trainer, self.steps, self.sharded, self.gradients, self.weights = None, 0, 0, {}, {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model(torch.zeros(2, 3, 8, 8))  # leaves some weights whole, in the dtype of the computation
        sum(self.trainer.constraints(model).values()).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.gradients[f"gradient.{name}"] = full_tensor(parameter.grad).clone()
        model.zero_grad()

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps += 1
        parameters = list(model.parameters())
        self.sharded += all(isinstance(parameter, DTensor) for parameter in parameters)
        pruner = self.trainer.compressor.pruner
        for name, mask in pruner.masks.items():
            assert (full_tensor(pruner.weights[name].detach())[~mask] == 0).all(), name

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == state.max_steps:
            self.weights = {f"now.{name}": full_tensor(p).clone() for name, p in model.state_dict().items()}


def run(case: str, folder: Path, resume: Path | None = None, **changes) -> dict:
    """Train, evaluate and, but for a case about resuming, test and save; all processes call it, or one alone."""
    options, accumulation = CASES[case]
    data = load_image_data("digits", augmentation="crop")
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model, processor = vit_from_config(data.class_names, (8, 8), 3, **sizes)
    watch, logits = Watch(), {}

    def keep(given):
        logits["clean"], logits["adversarial"] = logits.get("adversarial"), given.predictions  # in turn
        return {"collapsed": 0.0}  # as so short a run is

    size = 8 // (int(os.environ.get("WORLD_SIZE", 1)) * accumulation)
    args = TSCNCConfig(
        str(folder / "out"), per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        **(options | changes),
    )  # fmt: skip
    trainer = watch.trainer = TSCNCTrainer(
        model=model,
        args=args,
        train_dataset=data.train.subset(range(64)),
        eval_dataset=data.validation.subset(range(21)),
        processing_class=processor,
        compute_metrics=keep,
        callbacks=[watch],
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    best, metrics = trainer.state.best_global_step, trainer.evaluate()
    results = {}
    if case != "adamw":
        results = trainer.test(data.test.subset(range(13)), attacks=["clean", "pgd-2"])
        trainer.save_model()
    tensors = watch.gradients | watch.weights
    tensors |= {f"average.{name}": full_tensor(tensor) for name, tensor in trainer.model.state_dict().items()}
    tensors |= {f"mask.{name}": mask for name, mask in trainer.compressor.pruner.masks.items()}
    tensors |= {f"logits.{name}": torch.from_numpy(np.asarray(value)) for name, value in logits.items()}
    about = {
        "processes": trainer.accelerator.num_processes,
        "type": str(trainer.accelerator.distributed_type),
        "class": type(trainer.model).__name__,
        "steps": watch.steps,
        "sharded_steps": watch.sharded,
        "metrics": metrics,
        "evaluations": [entry for entry in trainer.state.log_history if "eval_accuracy" in entry],
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "best": best,
        "results": results,
    }
    return about | {"tensors": {name: tensor.detach().contiguous() for name, tensor in tensors.items()}}


def main(folder: Path) -> None:
    run_on_cpus()
    torch.set_num_threads(1)
    runs = {}
    for case in CASES:
        AcceleratorState._reset_state()  # it keeps the precision of the first trainer
        runs[case] = run(case, folder / case, **(PUSHING if case == "adamw" else {}))
    runs["resumed"] = run("adamw", folder / "resumed", resume=folder / "adamw" / "out" / CUT)
    for name, found in runs.items():
        path = folder / f"{name}.{dist.get_rank()}"
        save_file(found.pop("tensors"), path)
        path.with_name(f"{path.name}.json").write_text(json.dumps(found | {"backend": dist.get_backend()}))
    dist.destroy_process_group()
    os._exit(0)  # all is written; why so, says tests/processes.py


if __name__ == "__main__":
    main(Path(sys.argv[1]))
