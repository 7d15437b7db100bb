"""Killed, terminated, out of space, read-only: nothing of a run is lost, and it ends where an uncut one does."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import get_last_checkpoint

from recipes import vit_cifar10
from tests.killed_runs import Recipe
from tests.processes import PATIENCE
from tscnc_hf.training.resume.checkpoints import clear_unfinished, damage, finish_checkpoint, unfinished_folder
from tscnc_hf.training.resume.storage import StorageError, writing
from tscnc_hf.training.resume.termination import Termination
from tscnc_hf.training.trainer import TSCNCTrainer


# Whatever has a state or a draw of its own.
NOBODY = 65534
OPTIONS = {
    "num_train_epochs": 4,
    "per_device_train_batch_size": 16,
    "optim": "adamw_torch",
    "lr_scheduler_type": "cosine",
    "learning_rate": 5e-3,
    "pruning_start": 0.1,
    "pruning_end": 0.8,
    "pruning_interval": 3,
    "pruning_latent": True,
    "ema_decay": 0.9,
    "tsc_on": "gates",
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
}
STEPS = 16

RECIPE = {
    "dataset": "digits",
    "train_limit": 64,
    "test_limit": 16,
    "augmentation": "crop",
    "test_attacks": "clean",
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "dropout": 0.1,
    "attack_steps": 1,
    "eval_attack_steps": 1,
    "epsilon": 0.1,
    "tsc_on": "gates",
    "tsc_weight": 1e-4,
    "cnc_weight": 1e-3,
    "ema_decay": 0.9,
    "target_sparsity": 0.8,
    "pruning_interval": 2,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 256,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "save_total_limit": 2,
    "load_best_model_at_end": "true",
    "metric_for_best_model": "robust_accuracy",
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": "true",
    "use_cpu": "true",
}
# HYDRA's scores have a state of their own, and latent weights another: one of them in the short run, both in the long
LATENT, LEARNED = {"pruning_latent": "true"}, {"pruning_criterion": "learned", "pruning_scope": "learned"}


@pytest.fixture
def make_recipe(tmp_path):
    """`make_recipe(name, **options)`: a `Recipe`, of which nothing runs after the test."""
    made = []

    def make(name: str, **options) -> Recipe:
        made.append(Recipe(tmp_path / name, **options))
        return made[-1]

    yield make
    for recipe in made:
        recipe.close()


# ---- killed ----


@pytest.mark.parametrize(
    ("method", "every", "steps", "signals"),
    [
        pytest.param(LATENT, 2, 28, "KKTKK", id="short", marks=pytest.mark.launched),
        pytest.param(LATENT, 1, 48, "K" * 20, id="latent weights, 20 kills", marks=pytest.mark.faults),
        pytest.param(LEARNED, 3, 132, "K" * 20, id="learned scores, 20 kills", marks=pytest.mark.faults),
    ],
)
def test_a_run_that_is_killed_again_and_again_ends_as_an_uncut_one(method, every, steps, signals, make_recipe):
    options = RECIPE | method | {"eval_steps": every, "save_steps": every, "max_steps": steps}
    whole, cut = make_recipe("whole", **options), make_recipe("cut", **options)
    whole.finish()
    pace = whole.seconds_per_step() * every
    draw, within_a_save = random.Random(0), 0
    for index, letter in enumerate(signals):
        # the first before there is any checkpoint: where it falls within two saves, and within one, is random
        further = 0 if index == 0 else every * draw.randint(1, 2)
        number = signal.SIGKILL if letter == "K" else signal.SIGTERM
        status = cut.cut_off(number, further, draw.uniform(0, 0.9 * pace), "--resume", "true")
        assert status == (-signal.SIGKILL if letter == "K" else 143), cut.log.read_text()[-4000:]
        within_a_save += unfinished_folder(cut.folder).exists()
        if (last := get_last_checkpoint(cut.folder) if cut.folder.exists() else None) is not None:
            assert damage(last) is None
    cut.finish("--resume", "true")
    print(f"{within_a_save} of {len(signals)} within a save")
    assert within_a_save > 0 or len(signals) < 20

    log = cut.log.read_text()
    assert "training from the beginning" in log and "Not resumed from" not in log
    if "T" in signals:
        (line,) = [line for line in log.splitlines() if line.startswith("SIGTERM")]
        assert "the last checkpoint is intact" in line and "--resume true" in line
    last = f"checkpoint-{steps}"
    for name in ("model.safetensors", f"{last}/model.safetensors", f"{last}/tscnc_state.safetensors"):
        assert (cut.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert_equal(load_pickle(cut.folder / last / name), load_pickle(whole.folder / last / name), name)
    state, expected = cut.state(), whole.state()
    assert state["global_step"] == steps and not unfinished_folder(cut.folder).exists()
    for key in ("best_global_step", "best_metric"):
        assert state[key] == expected[key], key
    if expected["best_model_checkpoint"] is None:  # every network named one class only
        assert state["best_model_checkpoint"] is None
    else:
        assert Path(state["best_model_checkpoint"]) == cut.folder / Path(expected["best_model_checkpoint"]).name
    assert [_deterministic(entry) for entry in state["log_history"]] == [
        _deterministic(entry) for entry in expected["log_history"]
    ]
    assert len(expected["log_history"]) == steps + steps // every


def load_pickle(path: Path):
    with safe_globals():
        return torch.load(path, weights_only=True)


def assert_equal(one, other, where: str) -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}: {key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}: {index}")
    else:
        assert bool(torch.equal(one, other) if isinstance(one, torch.Tensor) else np.all(one == other)), where


def _deterministic(entry: dict) -> dict:
    return {key: value for key, value in entry.items() if not key.endswith(("runtime", "per_second"))}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_two_processes_write_one_checkpoint_and_end_on_a_signal(number, status, make_recipe):
    recipe = make_recipe("run", **RECIPE | LATENT | {"eval_steps": 1, "save_steps": 1, "max_steps": 1000})
    processes, deadline = recipe.start_group(2), time.monotonic() + PATIENCE
    while recipe.last_step() < 2 and all(process.is_alive() for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for process in processes:
        os.kill(process.pid, number)
    for process in processes:
        process.join(PATIENCE)
    log = recipe.log.read_text()
    assert [process.exitcode for process in processes] == [status, status], log[-4000:]
    last = get_last_checkpoint(recipe.folder)
    assert damage(last) is None and 2 <= recipe.last_step() < 1000
    files = json.loads((Path(last) / "checkpoint_files.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "tscnc_state.safetensors"} <= files.keys()
    assert log.count(f"{number.name}: training ended") == 1 and f"the last checkpoint is intact: {last}" in log


class Observer:
    """
    Looks at a run's folder whenever this process is about to open, make, rename or remove a file: what a kill at that
    moment would leave. `seen` has the contents of every checkpoint-* as they were seen: one, if it was always whole.
    """

    EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree")

    def __init__(self, folder: Path):
        self.folder, self.moments, self.looking, self.seen, self.least = str(folder), 0, True, {}, None
        sys.addaudithook(self)  # for the life of the process

    def __call__(self, event, arguments):
        if not self.looking or event not in self.EVENTS:
            return
        self.looking = False
        found = {name: self._contents(name) for name in self._names()}
        for name, contents in found.items():
            self.seen.setdefault(name, set()).add(contents)
        if found:
            self.least = min(len(found), self.least or len(found))
        assert found or self.least is None, "no checkpoint at all"
        self.moments, self.looking = self.moments + 1, True

    def _names(self):
        if not os.path.isdir(self.folder):
            return []
        return [name for name in os.listdir(self.folder) if name.startswith("checkpoint-")]

    def _contents(self, name):
        with os.scandir(os.path.join(self.folder, name)) as entries:
            return frozenset((entry.name, entry.stat().st_size) for entry in entries)


@contextmanager
def observed(folder: Path):
    observer = Observer(folder)
    try:
        yield observer
    finally:
        observer.looking = False


@pytest.mark.parametrize("limit", [1, 2])
def test_no_moment_shows_half_a_checkpoint(limit, build, make_trainer, tmp_path):
    options = OPTIONS | {"max_steps": 8, "save_total_limit": limit}
    trainer = make_trainer(build("vit"), output_dir=str(tmp_path / "run"), **options)
    with observed(tmp_path / "run") as observer:
        trainer.train()
    assert observer.moments > 50 and observer.least == 1
    assert sorted(observer.seen) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    assert {name: len(contents) for name, contents in observer.seen.items()} == dict.fromkeys(observer.seen, 1)
    assert len({frozenset(name for name, _ in contents) for seen in observer.seen.values() for contents in seen}) == 1
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint-6", "checkpoint-8"][-limit:]


def test_the_observer_notices_how_transformers_saves(build, make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(TSCNCTrainer, "_save_checkpoint", Trainer._save_checkpoint)
    trainer = make_trainer(build("vit"), output_dir=str(tmp_path / "run"), **OPTIONS | {"max_steps": 4})
    with observed(tmp_path / "run") as observer:
        trainer.train()
    assert min(map(len, observer.seen.values())) > 5


def test_a_checkpoint_that_is_replaced_is_there_before_and_after(tmp_path, monkeypatch):
    def write(text: str) -> Path:
        folder = unfinished_folder(tmp_path) / "checkpoint-4"
        folder.mkdir(parents=True)
        (folder / "weights").write_text(text)
        return folder

    finish_checkpoint(write("old"))
    written, replace, done = write("new"), os.replace, []

    def killed(source, target):
        if len(done) == 2:  # the list of files, the old one aside: now the new one would get its name
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        finish_checkpoint(written)
    monkeypatch.setattr(os, "replace", replace)
    assert not (tmp_path / "checkpoint-4").exists()
    clear_unfinished(tmp_path)
    assert (tmp_path / "checkpoint-4" / "weights").read_text() == "old" and damage(tmp_path / "checkpoint-4") is None
    assert finish_checkpoint(write("new")) == tmp_path / "checkpoint-4"
    assert (tmp_path / "checkpoint-4" / "weights").read_text() == "new" and os.listdir(tmp_path) == ["checkpoint-4"]


# ---- resumed ----


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    """Where the uncut run of OPTIONS is kept, once a test has made it."""
    return tmp_path_factory.mktemp("uncut")


@pytest.fixture
def whole(uncut, build, make_trainer) -> Path:
    """The folder of a run of OPTIONS, with all its checkpoints and the weights at its end; not to be changed."""
    if not (uncut / "run" / "model.safetensors").exists():
        trainer = make_trainer(build("vit", dropout=0.2), output_dir=str(uncut / "run"), **OPTIONS)
        trainer.train()
        trainer.save_model()
    return uncut / "run"


def assert_resumes_to(whole: Path, folder: Path, build, make_trainer, **options) -> None:
    trainer = make_trainer(build("vit", seed=7, dropout=0.2), output_dir=str(folder), **OPTIONS | options)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(folder / "end"))
    found, expected = load_file(folder / "end" / "model.safetensors"), load_file(whole / "model.safetensors")
    assert found.keys() == expected.keys() and trainer.state.global_step == STEPS
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"])
@pytest.mark.parametrize("change", [Path.unlink, cut_off])
def test_a_damaged_checkpoint_is_passed_over_and_named(name, change, whole, build, make_trainer, tmp_path, caplog):
    if (change, name) not in ((Path.unlink, "optimizer.pt"), (cut_off, "rng_state.pth")):
        checkpoint = shutil.copytree(whole / "checkpoint-10", tmp_path / "checkpoint-10")
        change(checkpoint / name)
        assert damage(checkpoint) == f"{name} is {'missing' if change is Path.unlink else 'cut off'}"
        return
    folder = tmp_path / "cut"
    for step in (8, 10):
        shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    change(folder / "checkpoint-10" / name)
    assert_resumes_to(whole, folder, build, make_trainer)
    assert f"checkpoint-10: {name} is" in caplog.text and "Going on from" in caplog.text


def test_half_a_checkpoint_that_is_asked_for_by_name_is_refused(whole, build, make_trainer, tmp_path):
    checkpoint = shutil.copytree(whole / "checkpoint-8", tmp_path / "checkpoint-8")
    (checkpoint / "optimizer.pt").unlink()  # upstream would go on with a new one
    trainer = make_trainer(build("vit"), output_dir=str(tmp_path / "again"), **OPTIONS)
    with pytest.raises(ValueError, match="not whole: optimizer.pt is missing"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 0


def test_without_a_whole_checkpoint_the_message_names_what_there_is(whole, build, make_trainer, tmp_path):
    shutil.copytree(whole / "checkpoint-8", tmp_path / "run" / "checkpoint-8")
    (tmp_path / "run" / "checkpoint-8" / "checkpoint_files.json").unlink()
    trainer = make_trainer(build("vit"), output_dir=str(tmp_path / "run"), **OPTIONS)
    with pytest.raises(ValueError, match="no whole checkpoint.*checkpoint-8: checkpoint_files.json is missing"):
        trainer.train(resume_from_checkpoint=True)


# ---- terminated ----


@pytest.mark.parametrize(
    ("at", "options", "saved"),
    [
        (("on_step_begin", 4), {}, 5),  # which would not have been saved
        (("on_step_begin", 7), {"save_steps": 3}, 8),  # the end of an epoch
        (("on_step_begin", 7), {"save_steps": 3, "eval_strategy": "epoch"}, 6),  # its evaluation is not left out
        (("on_step_end", 5), {"save_strategy": "no"}, None),
    ],
)
def test_sigterm_ends_a_run_that_can_go_on(at, options, saved, whole, build, make_trainer, watcher, tmp_path, caplog):
    def terminate(event, state, model):
        if (event, state.global_step) == at:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer(
        build("vit", dropout=0.2), output_dir=str(tmp_path / "run"), callbacks=[watcher(terminate, at[:1])],
        **OPTIONS | options,
    )  # fmt: skip
    with pytest.raises(SystemExit) as ending:
        trainer.train()
    assert ending.value.code == 143 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    last = get_last_checkpoint(tmp_path / "run")
    assert last == (str(tmp_path / "run" / f"checkpoint-{saved}") if saved else None)
    assert (f"the last checkpoint is intact: {last}" if saved else "no checkpoint had been written") in caplog.text
    assert ("Go on with resume_from" in caplog.text, 'with save_strategy="no"' in caplog.text) == (
        bool(saved), not saved,
    )  # fmt: skip
    if saved:
        assert_resumes_to(whole, tmp_path / "run", build, make_trainer, **options)


def test_a_handler_of_the_users_stays(build, make_trainer, watcher):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        kill = watcher(lambda event, state, model: os.kill(os.getpid(), signal.SIGTERM))
        trainer = make_trainer(build("vit"), callbacks=[kill], max_steps=2)
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM] * 2 and trainer.state.global_step == 2


class Interrupt(TrainerCallback):
    """Ctrl-C in the middle of step `at`, `times` times."""

    def __init__(self, at: int, times: int = 1):
        self.at, self.times, self.after = at, times, 0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)
                self.after += 1


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_saves_and_reaches_the_caller(whole, build, make_trainer, tmp_path, caplog):
    interrupt = Interrupt(5)
    trainer = make_trainer(
        build("vit", dropout=0.2), output_dir=str(tmp_path / "run"), callbacks=[interrupt], **OPTIONS
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and trainer.state.global_step == 5
    last = tmp_path / "run" / "checkpoint-5"  # which would not have been saved
    assert get_last_checkpoint(tmp_path / "run") == str(last) and damage(last) is None
    assert f"SIGINT: training ended after step 5; the last checkpoint is intact: {last}" in caplog.text
    assert trainer.evaluate()["eval_loss"] > 0  # the model that was left can be looked at
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert_resumes_to(whole, tmp_path / "copy", build, make_trainer)
    interrupt.at = 0
    trainer.train(resume_from_checkpoint=True)  # the same trainer goes on, as in a notebook
    trainer.save_model(str(tmp_path / "end"))
    found, expected = load_file(tmp_path / "end" / "model.safetensors"), load_file(whole / "model.safetensors")
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize(("times", "options", "after"), [(2, {}, 1), (1, {"save_strategy": "no"}, 0)])
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_at_once(times, options, after, build, make_trainer, tmp_path):
    """The second one, and the first where nothing would be saved."""
    interrupt = Interrupt(5, times)
    trainer = make_trainer(build("vit"), output_dir=str(tmp_path / "run"), callbacks=[interrupt], **OPTIONS | options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert interrupt.after == after and trainer.state.global_step == 4
    last = get_last_checkpoint(tmp_path / "run")
    assert last == (None if options else str(tmp_path / "run" / "checkpoint-4"))


def test_a_handler_of_the_users_for_ctrl_c_stays(build, make_trainer):
    received = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        trainer = make_trainer(build("vit"), callbacks=[Interrupt(1, 2)], max_steps=2)
        trainer.train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert received == [signal.SIGINT] * 2 and trainer.state.global_step == 2


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_leaves_a_forked_worker_alone(capfd):
    """It has the handler of the process that trains, and a terminal sends Ctrl-C to both."""
    with Termination(can_wait=True).watching():
        worker = os.fork()
        if worker == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 7
    assert "Ctrl-C" not in capfd.readouterr().err


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_in_another_thread_is_not_ours(build, make_trainer):
    seen = []
    trainer = make_trainer(build("vit"), max_steps=1)
    trainer.add_callback(Watch(lambda: seen.append(signal.getsignal(signal.SIGINT))))
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join(PATIENCE)
    assert seen == [signal.default_int_handler] and trainer.state.global_step == 1


class Watch(TrainerCallback):
    def __init__(self, look):
        self.look = look

    def on_step_end(self, *args, **kwargs):
        self.look()


def test_ctrl_c_ends_a_recipe_with_status_130(make_recipe):
    options = RECIPE | LATENT | {"eval_steps": 100, "save_steps": 100, "max_steps": 100_000}
    recipe = make_recipe("run", **options)
    process, deadline = recipe.start(), time.monotonic() + PATIENCE
    while "'loss'" not in (recipe.log.read_text() if recipe.log.exists() else "") and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(PATIENCE)
    log = recipe.log.read_text()
    assert process.exitcode == 130 and "Traceback" not in log, log[-4000:]
    assert recipe.last_step() > 0 and damage(get_last_checkpoint(recipe.folder)) is None
    assert log.count("SIGINT: training ended") == 1 and "--resume true" in log and "Again: end at once" in log


def test_saving_in_the_middle_of_a_step_is_refused(make_config):
    with pytest.raises(ValueError, match="enable_jit_checkpoint.*leave it off"):
        make_config(enable_jit_checkpoint=True)


# ---- no space, no permission ----


def mounted(folder: Path, *options: str) -> None:
    """Mount a small tmpfs there, or skip the test."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"needs the right to mount a tmpfs (CAP_SYS_ADMIN): {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    """A file system of 2 MB that is mounted for the test."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root and the command mount, for a small tmpfs")
    mounted(tmp_path / "disk", "-o", "size=2m")
    yield tmp_path / "disk"
    subprocess.run(["umount", "--lazy", tmp_path / "disk"], check=True)


@contextmanager
def full(disk: Path, leave: int):
    """The disk is full but for `leave` bytes."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - leave))
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def file_limit(size: int):
    """No file may grow beyond `size` bytes: works without any rights."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def read_only(disk: Path):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


def breaks_after_a_save(trouble, folder: Path, build, make_trainer, watcher) -> str:
    """Trouble comes after the first checkpoint and stays until training has failed. Returns the message."""
    entered = []

    def begin(event, state, model):
        if state.global_step == 2:
            entered.append(trouble())
            entered[0].__enter__()

    trainer = make_trainer(
        build("vit", dropout=0.2), output_dir=str(folder), callbacks=[watcher(begin, ["on_save"])], **OPTIONS
    )
    try:
        with pytest.raises(StorageError) as raised:
            trainer.train()
    finally:
        for context in entered:
            context.__exit__(None, None, None)
    message = str(raised.value)
    assert "\n" not in message and f"checkpoint-4 could not be written to {folder}" in message
    assert f"the last checkpoint is intact: {folder / 'checkpoint-2'}" in message
    return message


# how much of a checkpoint there is room for: not for the weights, not for the method's state, not for the optimizer
@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_a_full_disk(share, whole, disk, build, make_trainer, watcher):
    size = sum(path.stat().st_size for path in (whole / "checkpoint-2").iterdir())
    folder = disk / "run"
    message = breaks_after_a_save(lambda: full(disk, int(share * size)), folder, build, make_trainer, watcher)
    assert " free there" in message and "free some space" in message
    assert (os.strerror(errno.ENOSPC) if share < 0.9 else "torch could not write on, the disk is full") in message
    assert os.listdir(folder) == ["checkpoint-2"]  # half a checkpoint does not take up what is left
    assert_resumes_to(whole, folder, build, make_trainer, save_total_limit=1)


def test_a_limit_of_file_sizes(whole, build, make_trainer, watcher, tmp_path):
    size = (whole / "checkpoint-2" / "model.safetensors").stat().st_size
    folder = tmp_path / "run"
    message = breaks_after_a_save(lambda: file_limit(size - 1), folder, build, make_trainer, watcher)
    assert os.strerror(errno.EFBIG) in message and "raise the limit of file sizes (ulimit -f)" in message
    assert os.listdir(folder) == ["checkpoint-2"]
    assert_resumes_to(whole, folder, build, make_trainer)


def test_other_errors_than_those_of_files_pass(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory") as raised, writing("It", tmp_path):
        raise RuntimeError("CUDA error: out of memory")
    assert not isinstance(raised.value, StorageError)
    with file_limit(10_000), pytest.raises(StorageError, match="torch could not write on.*free there"):
        with writing("It", tmp_path):
            torch.save(torch.zeros(10_000), tmp_path / "file")


def test_a_folder_that_becomes_read_only(whole, disk, build, make_trainer, watcher):
    folder = disk / "run"
    message = breaks_after_a_save(lambda: read_only(disk), folder, build, make_trainer, watcher)
    assert os.strerror(errno.EROFS) in message and "make the folder writable, or use another one" in message
    assert_resumes_to(whole, folder, build, make_trainer, save_total_limit=1)


def test_a_read_only_folder_is_found_before_training(disk, build, make_trainer):
    trainer = make_trainer(build("vit"), output_dir=str(disk / "run"), **OPTIONS)
    with read_only(disk):
        with pytest.raises(
            StorageError, match=f"The output of this run could not be written to {disk}/run: Read-only"
        ):
            trainer.train()
        assert trainer.state.global_step == 0
        with pytest.raises(StorageError, match=f"The output folder could not be written to {disk}/new: Read-only"):
            make_trainer(build("vit"), output_dir=str(disk / "new"), **OPTIONS)


def test_a_folder_without_permission(build, make_trainer):
    with tempfile.TemporaryDirectory() as folder:  # tmp_path lies where nobody but its owner may look
        os.chmod(folder, 0o755)
        run = Path(folder) / "run"
        run.mkdir()
        trainer = make_trainer(build("vit"), output_dir=str(run), **OPTIONS)
        run.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(NOBODY)  # root may write to every folder
        try:
            with pytest.raises(StorageError, match="Permission denied.*make the folder writable"):
                trainer.train()
        finally:
            os.seteuid(user)
        assert trainer.state.global_step == 0 and list(run.iterdir()) == []


def test_a_recipe_ends_with_one_line(disk, monkeypatch):
    options = RECIPE | {"eval_steps": 2, "save_steps": 2, "max_steps": 2, "output_dir": str(disk / "run")}
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    with read_only(disk), pytest.raises(SystemExit) as ending:
        vit_cifar10.main(arguments)
    assert str(ending.value.code).startswith("error: The output folder could not be written to")
    assert "\n" not in ending.value.code and ending.value.__cause__ is None


def test_the_published_model_on_a_full_disk(disk, build, make_trainer):
    trainer = make_trainer(build("vit"), output_dir=str(disk / "run"), **OPTIONS | {"max_steps": 4})
    trainer.train()
    with full(disk, 4096), pytest.raises(StorageError, match="The model could not be written.*intact.*checkpoint-4"):
        trainer.save_model()
    trainer.save_model()
    assert load_file(disk / "run" / "model.safetensors").keys()
