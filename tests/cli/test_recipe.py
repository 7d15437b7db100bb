"""What the recipes share."""

from dataclasses import dataclass

import pytest
from PIL import Image
from torch import distributed

from recipes import ablation, vit_cifar10
from tscnc_hf.cli.recipe import DataArguments, interruptible, load_data, one_line_errors, parse, resume_point
from tscnc_hf.training.resume.storage import StorageError
from tscnc_hf.training.trainer import TSCNCTrainer


# ---- going on ----


@dataclass
class NoMore:
    """A recipe without options of its own."""


def checkpoint(folder, name="checkpoint-4"):
    (folder / name).mkdir(parents=True)
    (folder / name / "trainer_state.json").write_text("{}")
    return str(folder / name)


@pytest.mark.parametrize(
    ("options", "point"),
    [
        ([], False),
        (["--resume", "true"], True),
        (["--resume_from_checkpoint", "true"], True),
        (["--resume_from_checkpoint", "False"], False),
        (["--resume_from_checkpoint", "{}"], "{}"),
        (["--resume", "true", "--resume_from_checkpoint", "{}"], "{}"),
    ],
)
def test_what_a_recipe_goes_on_from(options, point, tmp_path):
    path = checkpoint(tmp_path)
    config, arguments, _ = parse(NoMore, [text.format(path) for text in options] + ["--output_dir", "out"])
    assert resume_point(config, arguments) == (point.format(path) if isinstance(point, str) else point)


def test_resume_from_checkpoint_in_yaml(tmp_path):
    (tmp_path / "options.yaml").write_text("resume_from_checkpoint: true")
    assert resume_point(*parse(NoMore, ["--config", str(tmp_path / "options.yaml")])[:2]) is True


@pytest.mark.parametrize(("name", "message"), [("nowhere", "does not exist"), ("", "is no checkpoint of a training")])
def test_a_checkpoint_that_is_not_there_ends_a_recipe_before_data_is_read(name, message, tmp_path):
    with pytest.raises(SystemExit, match=f"error: resume_from_checkpoint=.*{message}"):
        vit_cifar10.main(["--dataset", "nothing", "--resume_from_checkpoint", f"{tmp_path}/{name}"])


@pytest.fixture
def start(monkeypatch, tmp_path):
    """`start(*options)`: the recipe, up to training. Returns (output folder, what it goes on from) of each."""
    begun = []

    def train(trainer, resume_from_checkpoint=None):
        begun.append((trainer.args.output_dir, resume_from_checkpoint))
        if not trainer.args.output_dir.endswith("twin"):
            raise StorageError("far enough")

    monkeypatch.setattr(TSCNCTrainer, "train", train)
    monkeypatch.setattr(TSCNCTrainer, "test", lambda *args, **kwargs: {})
    small = {"dataset": "digits", "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"train_limit": 32, "test_limit": 8, "use_cpu": "true", "report_to": "none"}
    small |= {"output_dir": tmp_path / "run", "augmentation": "none"}

    def run(*options):
        begun.clear()
        with pytest.raises(SystemExit) as ending:
            vit_cifar10.main([text for key, value in small.items() for text in (f"--{key}", str(value))] + [*options])
        return list(begun), str(ending.value.code)

    return run


def test_a_recipe_goes_on_from_the_checkpoint_that_is_named(start, tmp_path):
    path = checkpoint(tmp_path / "earlier")
    folder = str(tmp_path / "run")
    assert start("--resume_from_checkpoint", path)[0] == [(folder, path)]
    assert start()[0] == [(folder, None)]
    assert start("--resume_from_checkpoint", "true")[0] == [(folder, None)]  # there is none yet
    twin = (f"{folder}-dense-twin", None)
    assert start("--compare_dense", "true", "--resume_from_checkpoint", path)[0] == [twin, (folder, path)]
    checkpoint(tmp_path / "run")
    assert start("--resume_from_checkpoint", "true")[0] == [(folder, True)]


def test_checkpoints_of_an_earlier_run_end_a_recipe_before_its_twin_is_trained(start, tmp_path):
    checkpoint(tmp_path / "run")
    begun, message = start("--compare_dense", "true")
    assert begun == [] and message.startswith("error: ") and "checkpoint-4 of an earlier run" in message


@pytest.mark.parametrize("name", ["model.safetensors", "model.sparse.safetensors", "model.safetensors.index.json"])
def test_a_finished_model_is_not_replaced(name, start, tmp_path):
    """It may be the one that is to be fine-tuned, or the teacher."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("of another run")
    for options in ([], ["--compare_dense", "true"], ["--resume", "true"]):
        begun, message = start(*options)
        assert begun == [] and message.startswith("error: ") and "holds a finished model, which this run" in message
    checkpoint(tmp_path / "run")
    assert start("--resume", "true")[0] == [(str(tmp_path / "run"), True)]  # whose run goes on


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pruning_layer_floor", "0.5", "--target_sparsity", "0.95"], "a sparsity of 0.9"),
        (["--pruning_exclude", "nosuch"], "pruning_exclude names 'nosuch'"),
        (["--patch_size", "3"], "patch_size=3 does not divide the input size 8"),
        (["--num_hidden_layers", "0"], "num_hidden_layers=0: give 1 or more"),
        (["--input_size", "20", "--interpolation", "nearest"], 'interpolation="nearest" from 8x8 to 20x20'),
        (["--target_sparsity", "0.9", "--max_steps", "5"], "training has 5 optimizer steps, so pruning from 0.25"),
        (
            ["--target_sparsity", "0.9", "--max_steps", "40", "--regrow_fraction", "0.3"],
            "regrow_fraction=0.3 exchanges weights every regrow_interval=100 steps",
        ),
        (
            ["--target_sparsity", "0.9", "--teacher", "no/where", "--distill_weight", "1"],
            "teacher='no/where': ",
        ),
        (["--tsc_on", "gates", "--gate_layers", "nosuch"], "gate layer 'nosuch' is not in"),
    ],
)
def test_wrong_options_end_a_recipe_before_its_twin_is_trained(options, message, start):
    begun, said = start("--compare_dense", "true", *options)
    assert begun == [] and said.startswith(f"error: {message}") and "\n" not in said


def test_a_run_too_short_for_its_schedule_ends_with_one_line(monkeypatch, start):
    monkeypatch.undo()
    said = start("--target_sparsity", "0.9", "--max_steps", "5")[1]
    assert said.startswith("error: training has 5 optimizer steps") and "\n" not in said


def test_an_image_that_cannot_be_decoded_ends_a_recipe_with_one_line(start, monkeypatch, tmp_path):
    for index in range(80):
        path = tmp_path / "data" / ("test" if index % 2 else "train") / "ab"[index // 40] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 3 * index).save(path)
    path = tmp_path / "data" / "test" / "a" / "03.png"  # not among those that are looked at before
    path.write_bytes(path.read_bytes()[:40])
    monkeypatch.setattr(TSCNCTrainer, "train", lambda *args, **kwargs: None)
    monkeypatch.setattr(TSCNCTrainer, "test", lambda trainer, data, **kwargs: [data[place] for place in range(40)])
    options = ("--decode", "as-read", "--image_size", "8", "--test_limit", "40")
    said = start("--dataset", str(tmp_path / "data"), *options)[1]
    assert said.startswith("error: image 1 of split 'test'") and "cannot be decoded" in said and "\n" not in said


@pytest.mark.parametrize("threads", ["0", "-2"])
def test_less_than_one_thread_is_wrong_usage(threads, capsys):
    with pytest.raises(SystemExit) as ended:
        vit_cifar10.main(["--dataset", "digits", "--output_dir", "out", "--cpu_threads", threads])
    assert ended.value.code == 2 and f"cpu_threads={threads}: at least 1 is needed" in capsys.readouterr().err


def test_an_ablation_takes_no_checkpoint(tmp_path):
    with pytest.raises(SystemExit, match="leave resume_from_checkpoint out"):
        ablation.main(["--dataset", "digits", "--resume_from_checkpoint", checkpoint(tmp_path)])


def test_ctrl_c_outside_of_training_ends_with_status_130():
    with pytest.raises(SystemExit) as ending, interruptible():
        raise KeyboardInterrupt
    assert ending.value.code == 130 and ending.value.__suppress_context__


def test_what_all_processes_refuse_is_said_once(monkeypatch, capsys):
    """Before they are connected by the first of a machine, then by whichever comes first; each text for itself."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")

    def refuse(text):
        with pytest.raises(SystemExit) as ended, one_line_errors():
            raise ValueError(text)
        return ended.value.code

    assert refuse("no such data") == 1
    for options in (["--nonsense", "1"], ["--output_dir", "out", "--epsilon", "-1"]):
        with pytest.raises(SystemExit) as ended:
            parse(NoMore, options)
        assert ended.value.code == 2 and capsys.readouterr().err == ""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        assert [refuse("one"), refuse("one"), refuse("two")] == ["error: one", 1, "error: two"]
    finally:
        distributed.destroy_process_group()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert refuse("no such data") == "error: no such data"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_of_several_processes_prints(rank, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    load_data(DataArguments(dataset="digits", augmentation="none", train_limit=20), seed=0)
    assert capsys.readouterr().out.count("Data: digits: 20 training") == (rank == "0")
