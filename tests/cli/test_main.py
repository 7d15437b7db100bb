"""Every command of `tscnc`, on folders that this library wrote and on those of plain transformers and timm."""

import copy
import json
import os
import shlex
import sys

import numpy as np
import pytest
import timm
import torch
from safetensors.numpy import load_file
from timm.models import save_for_hf

from tests.processes import run_command
from tscnc_hf.artifact.models.weights import same_tensors
from tscnc_hf.artifact.packed.file import read_sparse_file
from tscnc_hf.artifact.repository import conversion
from tscnc_hf.cli import main as cli
from tscnc_hf.cli.main import COMMANDS, main


PACKED = "model.sparse.safetensors"
SMALL = {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]}


@pytest.fixture
def folders(tmp_path, tiny_vit):
    """`folders(kind)`: "transformers" and "timm" as these write them, never pruned; "ours": 90 % zeros and packed."""

    def make(kind, name=None):
        folder = tmp_path / (name or kind)
        if kind == "timm":
            model = timm.create_model("resnet18", num_classes=10, **SMALL)
            model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.25,) * 3)
            save_for_hf(model, folder, model_args=SMALL, safe_serialization=True)
            return folder
        model, processor = tiny_vit
        if kind == "ours":
            model = copy.deepcopy(model)
            with torch.no_grad():
                for weight in model.vit.layers.parameters():
                    if weight.ndim == 2:
                        weight[torch.rand_like(weight) < 0.9] = 0
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if kind == "ours":
            conversion.pack(conversion.Repository(str(folder), folder, None, {}))
        return folder

    return make


def run(capsys, *args):
    """(exit code, what stands on stdout, on stderr without progress bars)."""
    capsys.readouterr()
    code = 0
    try:
        main([str(arg) for arg in args])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, "\n".join(line for line in err.splitlines() if "it/s" not in line and line.strip())


def as_json(capsys, *args):
    code, out, err = run(capsys, *args, "--json")
    assert code == 0, err
    assert out.count("\n") == 1  # one object and nothing else
    return json.loads(out)


def refused(capsys, *args):
    code, out, err = run(capsys, *args)
    assert code == 1 and out == "" and err.count("\n") == 0, (code, out, err)
    return err


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- help and usage ----


def test_help_is_quick_and_loads_no_framework():
    code = (
        "import sys\nfrom tscnc_hf.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'rich'} & set(sys.modules)"
    )
    shown = run_command([sys.executable, "-c", code]).stdout
    assert all(f"    {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_that_is_right(capsys, name):
    code, out, _ = run(capsys, name, "--help")
    shown = " ".join(out.split())
    assert code == 0 and f"usage: tscnc {name} " in shown and "--json" in shown and "exit codes" in shown
    example = COMMANDS[name][1]
    assert f"example: {example}" in shown
    program, command, *options = shlex.split(example)
    assert (program, command) == ("tscnc", name)
    if name == "evaluate":
        from tscnc_hf.cli.evaluate import parse

        assert parse(options).attacks[-1] == "autoattack"
    else:
        cli._parser().parse_args([command, *options])


@pytest.mark.parametrize(
    "args", [["prune"], ["inspect"], ["inspect", "a", "--depth"], ["push", "a"], ["evaluate", "--modle", "a"], []]
)
def test_wrong_usage_is_exit_code_2(capsys, args):
    code, out, err = run(capsys, *args)
    if not args:
        assert code == 0 and "inspect" in out  # nothing asked: the help
    else:
        assert code == 2 and out == "" and "error" in err


def test_version(capsys):
    assert run(capsys, "--version")[:2] == (0, f"tscnc-hf {cli.__version__}\n")


@pytest.mark.parametrize("command", ["inspect", "pack", "unpack", "card", "bench", "push", "evaluate"])
def test_what_can_not_be_done_is_exit_code_1_with_a_reason_in_one_line(capsys, command, folders, tmp_path):
    def go(model, *more):
        first = ["--model", model] if command == "evaluate" else [model, "a/b"] if command == "push" else [model]
        return refused(capsys, command, *first, *more)

    assert "no/such/folder" in go("no/such/folder")
    (tmp_path / "empty").mkdir()
    assert "empty" in go(tmp_path / "empty")
    damaged = folders("ours")
    data = bytearray((damaged / PACKED).read_bytes())
    data[-9] ^= 1
    (damaged / PACKED).write_bytes(bytes(data))
    (damaged / "model.safetensors").unlink()
    assert "digest" in go(damaged)


def test_a_file_is_no_folder(capsys, folders):
    folder = folders("ours")
    assert "give the folder that holds it" in refused(capsys, "inspect", folder / PACKED)


# ---- inspect ----


@pytest.mark.parametrize("kind", ["transformers", "timm", "ours"])
def test_inspect_counts_what_numpy_counts(capsys, kind, folders):
    folder = folders(kind)
    found = as_json(capsys, "inspect", folder, "--layers")
    tensors = load_file(folder / "model.safetensors")
    buffers = {name for name in tensors if "running_" in name or "num_batches" in name}
    weights = {name: value for name, value in tensors.items() if name not in buffers}
    assert found["parameters"] == sum(value.size for value in weights.values())
    assert found["sparsity"]["parameter_zeros"] == sum(int((value == 0).sum()) for value in weights.values())
    matrices = [
        value.reshape(len(value), -1) for value in weights.values() if value.ndim in (2, 4) and value.shape[0] > 1
    ]
    kappas = []
    for matrix in matrices:
        values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
        kept = values[values > 1e-6 * values[0]]
        kappas.append(kept[0] / kept[-1])
    assert found["spectrum"]["matrices"] == len(matrices) == len(found["spectrum"]["rows"])
    assert found["spectrum"]["max_effective_condition_number"] == pytest.approx(max(kappas), rel=1e-6)
    assert found["spectrum"]["median_effective_condition_number"] == pytest.approx(np.median(kappas), rel=1e-6)
    sizes = found["sizes"]
    assert sizes["dense_bytes"] == (folder / "model.safetensors").stat().st_size
    assert ("sparse_bytes" in sizes) == (kind == "ours")
    assert 0 < sizes["limit_bytes"] < sizes["dense_bytes"]
    assert found["classes"] == 10 and found["dtype"] == "float32"
    assert {"transformers": "ViTFor", "ours": "ViTFor", "timm": "resnet18"}[kind] in found["architecture"]
    assert "metrics" not in found and "method" not in found


def test_inspect_shows_a_table(capsys, folders, monkeypatch):
    folder = folders("ours")
    code, out, _ = run(capsys, "inspect", folder, "--layers")
    assert code == 0 and "effective condition number" in out and "vit.layers.0.attention.q_proj.weight" in out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "140")
    code, drawn, _ = run(capsys, "inspect", folder, "--layers")
    assert code == 0 and "━" in drawn and "vit.layers.0.attention.q_proj.weight" in drawn
    assert "spectrum" not in as_json(capsys, "inspect", folder, "--no-spectrum")


def test_inspect_reads_what_a_card_or_results_claim(capsys, folders):
    folder = folders("transformers")
    (folder / "README.md").write_text(
        "---\nmodel-index:\n- name: a\n  results:\n  - task: {type: image-classification}\n"
        "    dataset: {name: cifar10, type: cifar10}\n    metrics:\n    - {type: accuracy, value: 0.875}\n---\n# a\n"
    )
    found = as_json(capsys, "inspect", folder)
    assert found["metrics_from"] == "README.md" and found["metrics"][0]["value"] == 0.875
    assert "accuracy 87.5%" in run(capsys, "inspect", folder)[1]
    attack = {"name": "pgd-20", "accuracy": 0.5, "low": 0.4, "high": 0.6, "correct": 5, "n": 10, "parameters": {}}
    results = {"robustness": {"threat_model": {"norm": "linf", "epsilon": 0.1}, "attacks": [attack]}}
    (folder / "results.json").write_text(json.dumps(results | {"gates": {"gates": 4, "closed": 1, "rows": []}}))
    (folder / "tscnc_config.json").write_text(json.dumps({"objective": "trades", "target_sparsity": 0.9}))
    found = as_json(capsys, "inspect", folder)
    assert found["metrics_from"] == "results.json" and found["metrics"][0]["epsilon"] == 0.1
    shown = " ".join(run(capsys, "inspect", folder)[1].split())
    assert "accuracy, pgd-20 50.0% (40.0% to 60.0%, n = 10), linf 0.1 (25.5/255)" in shown
    assert "objective trades, target_sparsity 0.9" in shown and "1 of 4 closed" in shown


CARD = """---
model-index:
- name: a
  results:
  - task: {type: image-classification}
    dataset: {name: cifar10, type: cifar10}
    metrics:
    - {type: accuracy, value: VALUE, name: NAME}
---
# a
"""


def test_inspect_shows_what_somebody_else_wrote_as_it_is(capsys, folders):
    folder = folders("transformers")
    shown = {'"93.2%"': "93.2%", '"0.93 ± 0.01"': "0.93 ± 0.01", "93.2": "93.2", "0.5": "50.0%", ".nan": "n/a"}
    shown |= {"[1, 2]": "[1, 2]", "2024-01-01": "2024-01-01", "{a: .inf}": "{'a': 'inf'}"}
    for value, text in shown.items():
        (folder / "README.md").write_text(CARD.replace("VALUE", value).replace("NAME", "Top"), encoding="utf-8")
        code, out, err = run(capsys, "inspect", folder, "--no-spectrum")
        assert code == 0 and f"Top {text}\n" in out, (out, err)
        assert as_json(capsys, "inspect", folder, "--no-spectrum")["metrics_from"] == "README.md"


@pytest.mark.parametrize(
    "name, text",
    [
        ("latency.json", '{"rows": [1]}'),
        ("latency.json", '{"rows": [{"batch": 1}]}'),
        ("results.json", '{"robustness": {"attacks": [{}]}}'),
        ("results.json", '{"robustness": [1]}'),
        ("results.json", '{"collapsed": "x"}'),
        ("results.json", '{"gates": [1]}'),
    ],
)
def test_inspect_leaves_out_what_it_can_not_read(capsys, name, text, folders):
    folder = folders("transformers")
    (folder / name).write_text(text)
    (why,) = as_json(capsys, "inspect", folder, "--no-spectrum")["left_out"]
    assert why.startswith(f"{name} is not as `tscnc ")
    assert why in run(capsys, "inspect", folder, "--no-spectrum")[1]


def test_damaged_files_are_refused_by_name(capsys, folders):
    folder = folders("transformers")
    config = json.loads((folder / "config.json").read_text())
    for fields in (
        {"tscnc": "x"}, {"tscnc": {"resize": 5}}, {"tscnc": {"resize": {"image_size": 5}}}, {"hidden_size": "abc"},
        {"hidden_act": "evil"}, {"architectures": ["ResNetForImageClassification"]}, {"id2label": ["a"]},
        {"num_attention_heads": 0}, {"tscnc": {"pruning_exclude": "query"}},
    ):  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config | fields))
        assert f"{folder / 'config.json'}: " in refused(capsys, "inspect", folder, "--no-spectrum"), fields
    (folder / "config.json").write_text(json.dumps(config))
    for text in ('{"pruning_exclude": 3}', '{"pruning_exclude": "query"}', '{"target_sparsity": "0.9"}'):
        (folder / "tscnc_config.json").write_text(text)
        for command in ("inspect", "card"):
            assert f"{folder / 'tscnc_config.json'}: " in refused(capsys, command, folder)
    (folder / "tscnc_config.json").unlink()
    (folder / "README.md").write_bytes(b"\xff\xfe---\n")
    for command in (["inspect", folder], ["card", folder], ["push", folder, "tester/it"]):
        assert f"{folder / 'README.md'}: " in refused(capsys, *command)


def test_a_terminal_is_not_told_what_to_do_by_a_downloaded_file(capsys, folders, monkeypatch):
    folder = folders("transformers")
    names = {"Accuracy [clean]": "Accuracy [clean]", "Top [/b]": "Top [/b]", "[link=http://a.b]c[/link]": "[link=http"}
    for name, shown in (names | {r"\e[31mred\e]8;;x\a": "[31mred]8;;x", r"two\nlines": "two lines"}).items():
        (folder / "README.md").write_text(CARD.replace("VALUE", "0.5").replace("NAME", f'"{name}"'))
        code, out, _ = run(capsys, "inspect", folder, "--no-spectrum")
        assert code == 0 and f"{shown}" in out and "\x1b" not in out
        with monkeypatch.context() as patch:
            patch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
            patch.setenv("COLUMNS", "140")
            code, drawn, _ = run(capsys, "inspect", folder, "--no-spectrum")
        assert code == 0 and shown in drawn and "\x1b" not in drawn and "\a" not in drawn
    (folder / "a\x1b[2Jb").write_text("no folder")
    assert "a[2Jb is a file" in refused(capsys, "inspect", folder / "a\x1b[2Jb")


@pytest.mark.parametrize("option", ["--layers", "--json"])
def test_a_reader_who_leaves_ends_it_without_a_word(capsys, option, folders, monkeypatch):
    """As `head` does: another ending than that of what is refused."""
    folder, (read, write) = folders("transformers"), os.pipe()
    os.close(read)
    with monkeypatch.context() as patch, open(write, "w") as gone:
        patch.setattr(sys, "stdout", gone)
        code, _, err = run(capsys, "inspect", folder, "--no-spectrum", option)
    assert code == 141 and not err  # and closing it, as the end of a process does, has not failed


def test_a_reader_who_leaves_ends_an_evaluation_without_a_word(capsys, folders, monkeypatch, tmp_path):
    folder, (read, write) = folders("transformers"), os.pipe()
    os.close(read)
    options = [
        "--dataset",
        "digits",
        "--attacks",
        "clean",
        "--n",
        "4",
        "--full",
        "false",
        "--output_dir",
        tmp_path / "out",
    ]
    with monkeypatch.context() as patch, open(write, "w") as gone:
        patch.setattr(sys, "stdout", gone)
        code, _, err = run(capsys, "evaluate", "--model", folder, "--device", "cpu", *options)
    assert code == 141 and "rror" not in err


def test_two_models_in_one_folder_are_refused(capsys, folders, tiny_vit):
    folder = folders("ours")
    tiny_vit[0].classifier.weight.data.zero_()
    tiny_vit[0].save_pretrained(folder)
    for command in ("inspect", "card", "pack"):
        assert "other weights" in refused(capsys, command, folder)


def test_a_folder_that_is_not_there_is_named_without_the_hub(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for args in (["inspect", "nofolder"], ["push", "nofolder", "owner/name"], ["pack", "nofolder", "--output", "out"]):
        said = refused(capsys, *args)
        assert "there is no folder 'nofolder' here, and no model of that name in the Hub's cache" in said
    assert "of revision 'v1' in the Hub's cache" in refused(capsys, "inspect", "owner/name", "--revision", "v1")


def test_results_that_are_a_folder(capsys, folders, tmp_path):
    (tmp_path / "figures").mkdir()
    said = refused(capsys, "card", folders("transformers"), "--results", tmp_path / "figures")
    assert "figures is a folder; give the results.json that `tscnc evaluate` wrote into it" in said


# ---- pack and unpack ----


@pytest.mark.parametrize("kind", ["transformers", "timm", "ours"])
def test_pack_and_unpack_give_the_same_bits_back(capsys, kind, folders, tmp_path):
    folder = folders(kind)
    before = contents(folder)
    done = as_json(capsys, "pack", folder, "--output", tmp_path / "packed")
    assert done["sparse_bytes"] == (tmp_path / "packed" / PACKED).stat().st_size
    assert not (tmp_path / "packed" / "model.safetensors").exists()
    assert contents(folder) == before
    assert run(capsys, "unpack", tmp_path / "packed", "--output", tmp_path / "dense")[0] == 0
    assert run(capsys, "unpack", tmp_path / "packed", "--output", tmp_path / "dense")[0] == 0  # again: nothing changes
    old, new = load_file(folder / "model.safetensors"), load_file(tmp_path / "dense" / "model.safetensors")
    assert old.keys() == new.keys() and all(old[name].tobytes() == new[name].tobytes() for name in old)
    sides = {name: data for name, data in before.items() if not name.endswith(".safetensors")}
    assert {name: data for name, data in contents(tmp_path / "dense").items() if name in sides} == sides
    if kind == "timm":
        model = timm.create_model(f"local-dir:{tmp_path / 'dense'}", pretrained=True)
        assert torch.equal(model.conv1.weight, torch.from_numpy(old["conv1.weight"]))
    from tscnc_hf import load_sparse

    loaded = load_sparse(tmp_path / "packed")
    assert sum(p.numel() for p in loaded.parameters()) == as_json(capsys, "inspect", folder)["parameters"]


def test_pack_and_inspect_say_what_zeros_with_a_sign_were_worth(capsys, tiny_vit, tmp_path):
    model, processor = tiny_vit
    for layer in [module for module in model.vit.modules() if isinstance(module, torch.nn.Linear)]:
        layer.weight.data.mul_(torch.rand_like(layer.weight) < 0.05)
    minus = sum(int(((weight == 0) & weight.signbit()).sum()) for weight in model.parameters())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert as_json(capsys, "inspect", tmp_path)["minus_zeros"] == minus > 1000
    done = as_json(capsys, "pack", tmp_path)
    assert done["minus_zeros"] == minus and done["sparse_bytes"] < 0.5 * done["dense_bytes"]
    said = run(capsys, "pack", tmp_path)[1]
    assert f"% of it); {minus:,} weights were -0.0 and are 0.0" in said


def test_what_is_packed_is_packed_again_and_unpacked_inside_itself(capsys, folders, tmp_path):
    folder = folders("ours")
    as_json(capsys, "pack", folder, "--output", tmp_path / "packed")
    before = read_sparse_file(tmp_path / "packed" / "model.sparse.safetensors")
    as_json(capsys, "pack", tmp_path / "packed")  # only the packed file is left there
    assert same_tensors(read_sparse_file(tmp_path / "packed" / "model.sparse.safetensors"), before)
    for _ in range(2):
        as_json(capsys, "unpack", tmp_path / "packed", "--output", tmp_path / "packed" / "dense")
    assert not (tmp_path / "packed" / "dense" / "dense").exists()
    assert (tmp_path / "packed" / "dense" / "model.safetensors").is_file()


def test_pack_in_place_and_with_rounded_values(capsys, folders, tmp_path):
    folder = folders("transformers")
    (folder / "results.json").write_text("{}")
    (folder / "robustness.md").write_text("# of the unrounded weights")
    (folder / "state").mkdir()
    (folder / "state" / "evaluation.json").write_text("{}")
    assert run(capsys, "pack", folder)[0] == 0 and (folder / PACKED).is_file()
    assert "other weights" in refused(capsys, "pack", folder, "--value-dtype", "bf16")
    assert run(capsys, "pack", folder, "--value-dtype", "bf16", "--output", tmp_path / "small")[0] == 0
    assert {"config.json", PACKED, "preprocessor_config.json"} == set(contents(tmp_path / "small"))  # no old results
    assert as_json(capsys, "inspect", tmp_path / "small")["dtype"] == "float32"
    (tmp_path / "small" / "results.json").write_text("{}")  # of weights that bf16 holds already: it is the same model
    assert run(capsys, "unpack", tmp_path / "small")[0] == 0
    assert run(capsys, "pack", tmp_path / "small", "--value-dtype", "bf16", "--output", tmp_path / "same")[0] == 0
    assert set(contents(tmp_path / "small")) - set(contents(tmp_path / "same")) == {"model.safetensors"}
    assert (tmp_path / "same" / "results.json").is_file()
    assert run(capsys, "unpack", tmp_path / "same")[0] == 0
    dense = [load_file(tmp_path / name / "model.safetensors") for name in ("small", "same")]
    assert all(np.array_equal(dense[0][name], dense[1][name]) for name in dense[0].keys() | dense[1].keys())


def test_files_beside_the_weights_are_not_left_out_of_date(capsys, folders, tmp_path):
    """A corrected image processor is not passed over without a word."""
    folder, packed = folders("transformers"), tmp_path / "packed"
    assert run(capsys, "pack", folder, "--output", packed)[0] == 0
    assert run(capsys, "card", packed)[0] == 0 and run(capsys, "card", folder)[0] == 0  # each is of its own folder
    assert run(capsys, "pack", folder, "--output", packed, "--compression", "zstd")[0] == 0
    corrected = json.loads((folder / "preprocessor_config.json").read_text()) | {"image_mean": [0.1, 0.2, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(corrected))
    before = contents(packed)
    for command, source, target in (("pack", folder, packed), ("unpack", packed, folder)):
        err = refused(capsys, command, source, "--output", target)
        assert f"{target} has preprocessor_config.json of another content" in err and "give another folder" in err
    assert contents(packed) == before
    (packed / "preprocessor_config.json").unlink()
    assert run(capsys, "pack", folder, "--output", packed)[0] == 0
    assert json.loads((packed / "preprocessor_config.json").read_text()) == corrected
    (packed / "README.md").write_text("# by hand\n")
    assert "README.md of another content" in refused(capsys, "pack", folder, "--output", packed)


def test_what_was_made_of_the_values_does_not_go_with_rounded_ones(capsys, folders, tmp_path):
    folder = folders("transformers")
    for name in ("model.onnx", "deep/other.onnx", "latency.json", "notes.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    assert run(capsys, "pack", folder, "--output", tmp_path / "whole")[0] == 0
    assert {"model.onnx", "deep/other.onnx", "latency.json"} < set(contents(tmp_path / "whole"))
    assert run(capsys, "pack", folder, "--output", tmp_path / "half", "--value-dtype", "fp16")[0] == 0
    assert set(contents(tmp_path / "half")) == {"config.json", PACKED, "preprocessor_config.json", "notes.md"}


def test_unpacking_beside_shards_says_where_the_weights_are(capsys, tiny_vit, tmp_path):
    tiny_vit[0].save_pretrained(tmp_path, max_shard_size="20KB")
    assert run(capsys, "pack", tmp_path)[0] == 0
    assert as_json(capsys, "unpack", tmp_path)["written"] == str(tmp_path / "model.safetensors.index.json")
    assert not (tmp_path / "model.safetensors").exists()


def test_another_model_is_never_overwritten(capsys, folders):
    vit, other = folders("transformers"), folders("timm")
    pruned = folders("ours")  # the same config.json as `vit`, other weights
    for source in (vit, pruned):
        for target in (other, vit if source is pruned else pruned):
            before = contents(target)
            for command in ("pack", "unpack"):
                assert "give another folder" in refused(capsys, command, source, "--output", target)
            assert contents(target) == before


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_an_interrupted_conversion_leaves_the_folder_whole(capsys, command, folders, monkeypatch):
    folder = folders("ours")
    (folder / (PACKED if command == "pack" else "model.safetensors")).unlink()
    before = contents(folder)

    def power_cut(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tscnc_hf.artifact.files.atomic.os.replace", power_cut)
        assert run(capsys, command, folder)[0] == 130
    assert contents(folder) == before
    assert run(capsys, command, folder)[0] == 0 and len(contents(folder)) == len(before) + 1


# ---- evaluate and card ----


@pytest.mark.parametrize("kind", ["timm", "ours"])
def test_evaluate_then_card_then_inspect(capsys, kind, folders, tmp_path):
    folder, out = folders(kind), tmp_path / "figures-of-it"
    attack = ["--dataset", "digits", "--epsilon", "0.1", "--n", 12, "--attacks", "clean", "pgd-2", "--cpu-threads", 1]
    results = as_json(capsys, "evaluate", "--model", folder, *attack, "--device", "cpu", "--output-dir", out)
    assert [row["name"] for row in results["robustness"]["attacks"]] == ["clean", "pgd-2"]
    assert json.loads((out / "results.json").read_text()) == results
    given = ["--license", "mit", "--name", "you/it", "--note", "Scanned at 8 px.", "--note", "Twice."]
    as_json(capsys, "card", folder, "--results", out / "results.json", *given)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| Accuracy under PGD-2 |" in card and "license: mit" in card and 'from_pretrained("you/it")' in card
    assert "**Note:** Scanned at 8 px.\n" in card and "**Note:** Twice.\n" in card
    assert "adversarial-training" not in card and "This run pruned" not in card  # nobody knows how it was trained
    found = as_json(capsys, "inspect", folder)
    assert found["metrics"][0]["value"] == results["robustness"]["attacks"][0]["accuracy"]
    again = contents(folder)
    as_json(capsys, "card", folder, "--name", "you/it")
    assert contents(folder) == again  # all that it says is in the folder

    other = folders("transformers", "another-model")
    assert "is of other weights" in refused(capsys, "card", other, "--results", out / "results.json")
    assert not (other / "README.md").exists()


def test_a_card_of_somebody_else_stays(capsys, folders):
    folder = folders("transformers")
    (folder / "README.md").write_text("# by hand\n")
    assert "not written by this library" in refused(capsys, "card", folder)
    assert (folder / "README.md").read_text() == "# by hand\n"
    assert run(capsys, "card", folder, "--overwrite")[0] == 0 and "by hand" not in (folder / "README.md").read_text()


# ---- the Hub ----


@pytest.mark.parametrize("kind", ["transformers", "timm", "ours"])
def test_every_command_takes_a_hub_id(capsys, kind, folders, hub, tmp_path):
    folder = folders(kind)
    pushed = as_json(capsys, "push", folder, "tester/it", "--message", "First")
    assert pushed["commit"] == hub.commits("tester/it")[-1][0] and pushed["url"].startswith(hub.endpoint)
    assert hub.commits("tester/it")[-1][1] == "First"
    assert 'from_pretrained("tester/it")' in hub.content("tester/it", "README.md").decode()

    found = as_json(capsys, "inspect", "tester/it")
    here = as_json(capsys, "inspect", folder)
    assert found["commit"] == pushed["commit"]
    assert {k: v for k, v in found.items() if k not in ("model", "commit", "metrics", "metrics_from")} == {
        k: v for k, v in here.items() if k not in ("model", "metrics", "metrics_from")
    }
    if kind == "ours":  # of two files with the same weights the smaller one
        assert not [line for line in hub.requests("GET") if line.endswith("/model.safetensors")]
    assert "--output" in refused(capsys, "pack", "tester/it")
    assert run(capsys, "pack", "tester/it", "--output", tmp_path / "packed")[0] == 0
    assert run(capsys, "unpack", tmp_path / "packed", "--output", tmp_path / "dense")[0] == 0
    assert load_file(tmp_path / "dense" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    assert run(capsys, "card", "tester/it", "--output", tmp_path / "card")[0] == 0
    assert (tmp_path / "card" / "README.md").read_bytes() == hub.content("tester/it", "README.md")
    options = ["--dataset", "digits", "--n", 4, "--attacks", "clean", "--device", "cpu", "--epsilon", "0"]
    results = as_json(capsys, "evaluate", "--model", "tester/it", *options, "--output-dir", tmp_path / "evaluation")
    assert results["model"] == "tester/it" and results["robustness"]["n"] == 4


def test_what_is_not_on_the_hub_or_not_yours(capsys, folders, hub, monkeypatch):
    assert "no such model" in refused(capsys, "inspect", "tester/nothing")
    folder = folders("ours")
    as_json(capsys, "push", folder, "tester/secret", "--private")
    assert hub.repos["tester/secret"].private
    assert "no revision 'v9'" in refused(capsys, "inspect", "tester/secret", "--revision", "v9")
    as_json(capsys, "inspect", "tester/secret")
    for token in ("hf_stranger", None):
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
        assert "needs a token" in refused(capsys, "inspect", "tester/secret")
        assert refused(capsys, "push", folder, "tester/secret")
    assert len(hub.commits("tester/secret")) == 2


def test_a_hub_that_can_not_be_reached(capsys, hub, folders):
    hub.shutdown()
    hub.server_close()
    assert refused(capsys, "inspect", "tester/it")
    assert "can not be reached" in refused(capsys, "push", folders("ours"), "a-name-without-an-owner")
