"""Options from a YAML file and from the command line."""

from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest

from tests.processes import run_python
from tscnc_hf.cli.parser import ConfigParser
from tscnc_hf.cli.recipe import DataArguments, parse
from tscnc_hf.training.config import TSCNCConfig


RECIPES = Path(__file__).parents[2] / "recipes"


@dataclass
class Extra:
    """More options."""

    depth: int = field(default=2, metadata={"help": "Depth."})
    names: list[str] = field(default_factory=list, metadata={"help": "Names."})
    needed: int = field(default=0, metadata={"help": "A number."})


@pytest.fixture
def parsed(tmp_path):
    """`parsed(yaml_text, *command_line)` -> (TSCNCConfig, DataArguments, Extra)."""

    def run(text: str | None, *args: str):
        own = ["--output_dir", str(tmp_path / "out"), "--use_cpu"]
        if text is not None:
            (tmp_path / "options.yaml").write_text(text)
            own += ["--config", str(tmp_path / "options.yaml")]
        return parse(Extra, [*own, *args])

    return run


@pytest.fixture
def refused(parsed, capsys):
    """`refused(yaml_text, *command_line)` -> what is printed when it ends with exit code 2."""

    def run(text: str | None, *args: str) -> str:
        with pytest.raises(SystemExit) as caught:
            parsed(text, *args)
        assert caught.value.code == 2
        printed = capsys.readouterr().err
        assert "Traceback" not in printed
        return printed.split("error: ", 1)[1]

    return run


# ---- values ----


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 5e-5", "learning_rate", 5e-5),  # YAML reads a string
        ("learning_rate: 5.0e-5", "learning_rate", 5e-5),
        ("tsc_weight: 1e-7", "tsc_weight", 1e-7),
        ("num_train_epochs: 3", "num_train_epochs", 3.0),
        ("epsilon: 8/255", "epsilon", 8 / 255),
        ('epsilon: "8/255"', "epsilon", 8 / 255),
        ("epsilon: 0.1", "epsilon", 0.1),
        ("attack_step_size: 2/255", "attack_step_size", 2 / 255),
        ("seed: 7", "seed", 7),
        ("load_best_model_at_end: false", "load_best_model_at_end", False),
        ("channels_last: true", "channels_last", True),
        ('channels_last: "yes"', "channels_last", True),
        ("remove_unused_columns: false", "remove_unused_columns", False),
        ("pruning_exclude: [classifier, head]", "pruning_exclude", ["classifier", "head"]),
        ("report_to: [tensorboard]", "report_to", ["tensorboard"]),
        ("lr_scheduler_kwargs: {num_cycles: 2}", "lr_scheduler_kwargs", {"num_cycles": 2}),
        ("pruning_exclude: []", "pruning_exclude", []),
        ("pruning_exclude: [1, head]", "pruning_exclude", ["1", "head"]),  # YAML reads a number
        ("max_steps: 12", "max_steps", 12),
        ("eval_strategy: epoch", "eval_strategy", "epoch"),
        ('eval_strategy: "no"', "eval_strategy", "no"),
        ("eval_strategy: no", "eval_strategy", "no"),  # YAML reads False
        ("", "epsilon", 8 / 255),
        ("hub_revision: 1.10", "hub_revision", "1.10"),  # YAML reads 1.1
        ("run_name: 2024_11_28", "run_name", "2024_11_28"),  # 20241128
        ("run_name: 2024-11-28", "run_name", "2024-11-28"),  # a date
        ("run_name: on", "run_name", "on"),  # true
        ("run_name: 0x10", "run_name", "0x10"),
        ("run_name: null", "run_name", None),
        ("seed: 010", "seed", 10),  # 8
        ("seed: 1_000", "seed", 1000),
        ("pruning_exclude: [1.10, 2024-11-28]", "pruning_exclude", ["1.10", "2024-11-28"]),
        ("optim_target_modules: [a, b]", "optim_target_modules", ["a", "b"]),
        ("pruning_layer_sparsity: {head: 0.5}", "pruning_layer_sparsity", {"head": 0.5}),
        ("<<: {seed: 012}", "seed", 12),
    ],
)
def test_a_value_of_the_file(text, name, value, parsed):
    config, _, _ = parsed(text)
    got = getattr(config, name)
    assert got == value and type(getattr(got, "value", got)) is type(value)


def test_every_dataclass_is_served(parsed):
    _, data, extra = parsed("dataset: digits\ntest_attacks: [clean]\ncompare_dense: true\ndepth: 5\nimage_size: 8\n")
    assert (data.dataset, data.test_attacks, data.compare_dense, data.image_size) == ("digits", ["clean"], True, 8)
    assert extra.depth == 5 and DataArguments().compare_dense is False


@pytest.mark.parametrize(
    ("text", "args", "name", "value"),
    [
        ("learning_rate: 1e-3", ["--learning_rate", "2e-3"], "learning_rate", 2e-3),
        ("epsilon: 8/255", ["--epsilon", "4/255"], "epsilon", 4 / 255),
        ("channels_last: true", ["--channels_last", "false"], "channels_last", False),
        ("channels_last: false", ["--channels_last"], "channels_last", True),
        ("pruning_exclude: [head]", ["--pruning_exclude", "a", "b"], "pruning_exclude", ["a", "b"]),
        ("target_sparsity: 0.5", ["--target_sparsity=0.9"], "target_sparsity", 0.9),
        (None, ["--epsilon", "8/255"], "epsilon", 8 / 255),
    ],
)
def test_the_command_line_wins(text, args, name, value, parsed):
    assert getattr(parsed(text, *args)[0], name) == value


def test_a_required_option_may_come_from_the_file(tmp_path):
    @dataclass
    class Needs:
        depth: int

    (tmp_path / "a.yaml").write_text("depth: 3")
    assert ConfigParser([Needs]).parse([f"--config={tmp_path / 'a.yaml'}"])[0].depth == 3
    with pytest.raises(SystemExit) as caught:
        ConfigParser([Needs]).parse([])
    assert caught.value.code == 2


def test_of_two_maps_the_later_file_wins(tmp_path):
    @dataclass
    class Made:
        model_args: str = "{}"

    for name, depth in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.yaml").write_text(f"model_args: {{depth: {depth}}}\n")
    files = [word for name in "ab" for word in ("--config", str(tmp_path / f"{name}.yaml"))]
    assert ConfigParser([Made]).parse(files)[0].model_args == {"depth": 2}


# ---- errors ----


@pytest.mark.parametrize(
    ("text", "args", "parts"),
    [
        ("sparsity: 0.9\nepsilon: 0.1", [], ["options.yaml", "unknown", "sparsity"]),
        ("1: 2\nfoo: 3", [], ["unknown", "1", "foo"]),
        ("config: other.yaml", [], ["unknown", "config"]),
        (None, ["--sparsity", "0.9"], ["unknown option(s) --sparsity", "`--help` lists"]),
        (None, ["--name=x"], ["--name (perhaps --names)"]),
        (None, ["--target_spars", "0.9"], ["--target_spars"]),
        (None, ["--config", "/nowhere/x.yaml"], ["/nowhere/x.yaml", "no such file"]),
        ("- epsilon\n- 3", [], ["option: value", "list"]),
        ("just words", [], ["option: value", "str"]),
        ("epsilon: [1", [], ["not valid YAML"]),
        ("seed: 1\nepsilon: 0.1\nseed: 2", [], ["options.yaml", "seed is given in line 1 and in line 3; keep one"]),
        (
            "lr_scheduler_kwargs: {num_cycles: 2,\n  num_cycles: 3}",
            [],
            ["num_cycles is given in line 1 and in line 2"],
        ),
        ("pruning_exclude: {head: 1}", [], ["pruning_exclude={'head': 1}", "give a list of texts"]),
        ("pruning_exclude: [[head]]", [], ["pruning_exclude=[['head']]", "give a list of texts"]),
        ("pruning_exclude: [head, null]", [], ["pruning_exclude=['head', None]", "give a list of texts"]),
        ("pruning_exclude: [no]", [], ["pruning_exclude=[False]", "in quotes"]),
        ("channels_last:", [], ["channels_last has no value; give true or false"]),
        ("test_attacks: null", [], ["test_attacks has no value; give a list"]),
        ("dataset:", [], ["dataset has no value; give a text"]),
        ("dataset: [a, b]", [], ["dataset=['a', 'b']", "give one text"]),
        ("dataset: {a: b}", [], ["dataset={'a': 'b'}", "give one text"]),
        ("hub_revision: [main]", [], ["hub_revision=['main']", "give one text"]),
        ("num_train_epochs: 1:30", [], ["num_train_epochs", "'1:30'"]),  # YAML reads 90
        ("objective: gairat", [], ["objective='gairat'", "natural, pgd-at, trades, mart"]),
        ("pruning_scope: 3", [], ["pruning_scope=3", "global, uniform, erk, learned"]),
        (None, ["--objective", "gairat"], ["objective", "gairat", "natural"]),
        ("learning_rate: fast", [], ["learning_rate", "fast"]),
        ("attack_steps: 1.5", [], ["attack_steps", "1.5"]),
        ("channels_last: perhaps", [], ["channels_last", "perhaps"]),
        ("epsilon: 8", [], ["epsilon=8 ", "8/255"]),
        ("epsilon: [1, 2]", [], ["epsilon"]),
        ("learning_rate: [1, 2]", [], ["learning_rate"]),
        ("learning_rate: {a: 1}", [], ["learning_rate"]),
        ("target_sparsity: 1.0", [], ["target_sparsity=1.0", "[0, 1)"]),
        ("pruning_exclude: head", [], ["pruning_exclude", "list"]),
        ("test_attacks: clean", [], ["test_attacks='clean'", "give a list, [clean]"]),
        ("data_notes: Images went through JPEG.", [], ["data_notes", "give a list"]),
        (None, ["--pruning_start", "0.9", "--pruning_end", "0.1"], ["pruning_end=0.1", "pruning_start=0.9"]),
        (None, ["--adversary", "none"], ["objective='trades'", "adversary"]),
    ],
)
def test_a_wrong_option_ends_with_code_2_and_is_named(text, args, parts, refused):
    message = refused(text, *args)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_in_another_encoding_is_named(encoding, tmp_path, capsys):
    path = tmp_path / "options.yaml"
    path.write_bytes("# f\u00fcr Ziffern\ndepth: 3\n".encode(encoding))
    with pytest.raises(SystemExit) as caught:
        ConfigParser([Extra]).parse(["--config", str(path)])
    assert caught.value.code == 2 and f"--config {path} is not text in UTF-8" in capsys.readouterr().err
    path.write_text("# f\u00fcr Ziffern\ndepth: 3\n", encoding="utf-8")
    assert ConfigParser([Extra]).parse(["--config", str(path)])[0].depth == 3


@pytest.mark.parametrize("recipe", ["vit_cifar10", "timm_cifar10"])
def test_help_lists_every_option(recipe):
    done = run_python([RECIPES / f"{recipe}.py", "--help"])
    listed = set(done.stdout.replace(",", " ").split())
    for one in (TSCNCConfig, DataArguments):
        missing = [f.name for f in fields(one) if f.init and f"--{f.name}" not in listed]
        assert not missing
    assert "--config" in listed


def test_a_later_file_wins_over_an_earlier_one_and_the_command_line_over_both(tmp_path, parsed):
    for name, text in (("first", "depth: 3\nneeded: 4\nseed: 5\n"), ("second", "needed: 6\nseed: 7\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    files = ["--config", str(tmp_path / "first.yaml"), f"--config={tmp_path / 'second.yaml'}"]
    config, _, extra = parsed(None, *files, "--seed", "8")
    assert (extra.depth, extra.needed, config.seed) == (3, 6, 8)
