"""Integers are integers, and no number is NaN or a truth value: in Python, in YAML and on the command line."""

import math

import pytest

from recipes.ablation import AblationArguments
from tscnc_hf.cli.evaluate import EvaluationArguments
from tscnc_hf.cli.evaluate import parse as parse_evaluation
from tscnc_hf.cli.recipe import DataArguments
from tscnc_hf.training.config import TSCNCConfig


@pytest.mark.parametrize(
    "options, message",
    [
        ({"attack_steps": 2.5}, "attack_steps=2.5: give a whole number"),
        ({"eval_attack_steps": True}, "eval_attack_steps=True: bool, give a whole number"),
        ({"pruning_row_floor": "1"}, "pruning_row_floor='1': str"),
        ({"cnc_interval": None}, "cnc_interval=None"),
        ({"pruning_interval": math.inf}, "pruning_interval=inf: give a whole number that is finite"),
        ({"per_device_train_batch_size": 2.5}, "per_device_train_batch_size=2.5"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"save_total_limit": 1.5}, "save_total_limit=1.5"),
        ({"learning_rate": math.nan}, "learning_rate=nan: give a number that is finite"),
        ({"weight_decay": True}, "weight_decay=True: bool"),
        ({"num_train_epochs": math.inf}, "num_train_epochs=inf"),
        ({"trades_beta": math.nan}, "trades_beta=nan"),
        ({"pruning_layer_sparsity": {"head": math.nan}}, "pruning_layer_sparsity of 'head'=nan is outside"),
        ({"pruning_layer_sparsity": '{"head": true}'}, "pruning_layer_sparsity of 'head'=True is a bool"),
        ({"epsilon": math.nan}, "epsilon"),
        ({"attack_step_size": True}, "attack_step_size"),
        ({"epsilon": True}, "epsilon"),
    ],
)
def test_what_is_no_such_number_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TSCNCConfig(str(tmp_path), use_cpu=True, report_to="none", **options)


def test_what_is_one_is_taken(tmp_path):
    config = TSCNCConfig(
        str(tmp_path), use_cpu=True, report_to="none", attack_steps=3.0, max_grad_norm=math.inf, warmup_steps=0.1,
        eval_steps=0.5, save_total_limit=None, tsc_weight=1,
    )  # fmt: skip
    assert config.attack_steps == 3 and isinstance(config.attack_steps, int)


def test_of_other_options_too():
    for made, options, message in (
        (EvaluationArguments, {"model": "m", "n": 2.5}, "n=2.5"),
        (EvaluationArguments, {"model": "m", "batch_size": True}, "batch_size=True"),
        (DataArguments, {"train_limit": 1.5}, "train_limit=1.5"),
        (DataArguments, {"validation_fraction": math.nan}, "validation_fraction=nan"),
        (AblationArguments, {"seeds": [0, 1.5]}, r"seeds=\[0, 1.5\]"),
        (AblationArguments, {"sparsities": [0.9, True]}, r"sparsities=\[0.9, True\]"),
        (AblationArguments, {"workers": 1.5}, "workers=1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            made(**options)


@pytest.mark.parametrize(
    "line, message",
    [
        ("n: 2.5", "--n"),
        ("n: true", "n=True; give a number"),
        ("batch_size: .nan", "batch_size"),
        ("seed: [1]", "give one"),
    ],
)
def test_in_yaml(line, message, tmp_path, capsys):
    (tmp_path / "options.yaml").write_text(f"model: m\n{line}\n")
    with pytest.raises(SystemExit) as end:
        parse_evaluation(["--config", str(tmp_path / "options.yaml")])
    assert end.value.code == 2 and message in capsys.readouterr().err
