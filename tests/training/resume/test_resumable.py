"""`ResumableTrainer` alone: a task without images, killed and resumed; what it refuses."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from tests.processes import PATIENCE, run_python, started_python
from tscnc_hf.training.resume.checkpoints import damage
from tscnc_hf.training.resume.resumable import ResumableTrainer


STEPS = 60
# Nothing of ours but the trainer: a regression on numbers, with dropout and shuffling.
SCRIPT = """
import sys, time
import torch
from torch import nn
from transformers import TrainingArguments, TrainerCallback
from tscnc_hf.training.resume.resumable import ResumableTrainer

class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1))

    def forward(self, x, labels):
        prediction = self.layers(x).squeeze(-1)
        return {"loss": nn.functional.mse_loss(prediction, labels), "logits": prediction}

class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(float(sys.argv[3]))

generator = torch.Generator().manual_seed(0)
x = torch.randn(120, 4, generator=generator)
data = [{"x": row, "labels": row.sum()} for row in x]
torch.manual_seed(int(sys.argv[2]) if len(sys.argv) > 4 else 0)
args = TrainingArguments(
    sys.argv[1], max_steps=60, per_device_train_batch_size=16, save_steps=5, save_total_limit=2, use_cpu=True,
    report_to="none", disable_tqdm=True, learning_rate=1e-2, logging_steps=1,
)
trainer = ResumableTrainer(Line(), args, train_dataset=data, callbacks=[Slow()])
trainer.train(resume_from_checkpoint=True if len(sys.argv) > 4 else None)
trainer.save_model()
"""


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_task_without_images_is_killed_and_goes_on_exactly(number, status, tmp_path):
    run_python(["-c", SCRIPT, tmp_path / "whole", 7, 0])
    folder, log = tmp_path / "cut", tmp_path / "log"
    log.touch()
    with started_python(["-c", SCRIPT, folder, 7, 0.05], (os.devnull, log, log)) as process:
        while not checkpoints(folder) and process.is_alive():
            time.sleep(0.01)
        os.kill(process.pid, number)
        process.join(PATIENCE)
    assert process.exitcode == status, log.read_text()
    assert ("KeyboardInterrupt" in log.read_text()) == (number == signal.SIGINT)
    last = checkpoints(folder)[-1]
    assert damage(last) is None and 5 <= int(last.name.split("-")[1]) < STEPS
    run_python(["-c", SCRIPT, folder, 7, 0, "resume"])
    for name in ("model.safetensors", f"checkpoint-{STEPS}/model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    logs = [json.loads((one / f"checkpoint-{STEPS}/trainer_state.json").read_text())["log_history"]
            for one in (folder, tmp_path / "whole")]  # fmt: skip
    assert [entry["loss"] for entry in logs[0]] == [entry["loss"] for entry in logs[1]] and len(logs[0]) == STEPS


class Constant(nn.Module):
    def __init__(self, width: int = 3):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(width))

    def forward(self, labels):
        return {"loss": ((self.value.sum() - labels) ** 2).mean()}


def trainer(folder: Path, count: int = 20, model: nn.Module | None = None, **options) -> ResumableTrainer:
    defaults = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True}
    args = TrainingArguments(str(folder), **defaults | {"report_to": "none", "disable_tqdm": True} | options)
    data = [{"labels": float(number)} for number in range(count)]
    return ResumableTrainer(model or Constant(), args, train_dataset=data)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 1.0}, r"learning_rate=5e-05 \(now 1.0\)"),
        ({"train_sampling_strategy": "sequential"}, r"train_sampling_strategy='random' \(now 'sequential'\)"),
        ({"count": 21}, r"train.items=20 \(now 21\)"),
        ({"model": Constant(4)}, "1 of another shape: value"),
    ],
)
def test_other_options_data_or_weights_are_refused(changed, message, tmp_path):
    trainer(tmp_path).train()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changed).train(resume_from_checkpoint=True)


def test_what_shapes_nothing_may_be_another(tmp_path):
    first = trainer(tmp_path)
    first.train()
    options = {"logging_steps": 1, "save_total_limit": 1, "eval_accumulation_steps": 2, "dataloader_num_workers": 1}
    again = trainer(tmp_path, max_steps=6, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6 and load_file(checkpoints(tmp_path)[-1] / "model.safetensors")


def test_a_new_run_does_not_begin_among_the_checkpoints_of_another(tmp_path):
    trainer(tmp_path).train()
    with pytest.raises(ValueError, match="holds 2 checkpoints, up to checkpoint-4, of an earlier run"):
        trainer(tmp_path).train()


@pytest.mark.parametrize(
    "length",
    [{"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 2}, {"max_steps": -1, "num_train_epochs": 0.5},
     {"max_steps": 7, "gradient_accumulation_steps": 2}],
)  # fmt: skip
def test_a_run_that_is_over_takes_no_step_more(length, tmp_path):
    first = trainer(tmp_path, **(length | {"save_steps": 1}))
    first.train()
    names = [path.name for path in checkpoints(tmp_path)]
    for _ in range(2):
        again = trainer(tmp_path, model=Constant(), **(length | {"save_steps": 1}))
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == first.state.global_step == len(names)
        assert [path.name for path in checkpoints(tmp_path)] == names
        assert torch.equal(again.model.value, first.model.value)


def test_a_run_that_was_stopped_goes_on_to_its_end_and_no_further(tmp_path):
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    def run(stops, **options):
        made = trainer(tmp_path, max_steps=6, save_steps=1)
        if stops:
            made.add_callback(Stops())
        made.train(**options)
        return made.state.global_step

    assert run(True) == 3
    assert [run(False, resume_from_checkpoint=True) for _ in range(3)] == [6, 6, 6]
    assert checkpoints(tmp_path)[-1].name == "checkpoint-6"


def test_a_run_that_begins_anew_has_a_folder_of_its_own_checkpoints(tmp_path):
    made = trainer(tmp_path, max_steps=8)
    made.train()
    made.args.max_steps = 4
    for earlier in ([2, 4, 6, 8], [2, 4]):
        made.train()
        assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
        *_, away = sorted(tmp_path.glob("_earlier-run-*"))
        assert [path.name for path in checkpoints(away)] == [f"checkpoint-{step}" for step in earlier]
        assert all(damage(path) is None for path in checkpoints(away))
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))  # the same run
    assert len(list(tmp_path.glob("_earlier-run-*"))) == 2 and len(checkpoints(tmp_path)) == 2
    made.train(resume_from_checkpoint=str(tmp_path / "_earlier-run-1" / "checkpoint-2"))  # of another run
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4"]
    again = trainer(tmp_path, max_steps=4)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
