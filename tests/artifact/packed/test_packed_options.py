"""Compression, rounded values, the config that belongs to the weights, and loading through transformers."""

import builtins
import json
import sys

import pytest
import torch
from transformers import AutoModelForImageClassification, ViTModel

import tscnc_hf
from tests.processes import run_command
from tests.small_models import MODELS, assert_same_weights, logits, resnet, vit
from tscnc_hf.artifact.models import loading
from tscnc_hf.artifact.models.config import config_digest
from tscnc_hf.artifact.models.loading import load_sparse, load_weights
from tscnc_hf.artifact.models.quantizer import SparseHfQuantizer
from tscnc_hf.artifact.models.saving import save_sparse
from tscnc_hf.artifact.packed.file import (
    GAPS,
    SPARSE_FILE,
    pack_tensors,
    read_sparse_file,
    read_sparse_metadata,
    unpack_tensors,
    write_sparse_file,
)
from tscnc_hf.artifact.packed.limit import storage_limit


def sparse(*shape, density=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return values.masked_fill(torch.rand(shape, generator=generator) >= density, 0.0)  # not * mask: that makes -0.0


@pytest.mark.parametrize("make", [lambda: vit(hidden_size=128), resnet], ids=["vit", "resnet"])
def test_a_compressed_model_is_the_same_and_smaller(make, tmp_path):
    model = make()
    plain = save_sparse(model, tmp_path / "plain").stat().st_size
    packed = save_sparse(model, tmp_path / "zstd", compression="zstd")
    assert packed.stat().st_size < plain
    assert_same_weights(load_sparse(tmp_path / "zstd"), model)


def test_sizes_are_near_the_limit():
    """The ratios that the benchmark measures on whole models, on one layer of their kind."""
    for density in (0.1, 0.05, 0.01):
        tensors = {"w": sparse(512, 2304, density=density)}
        limit = storage_limit(tensors)
        for compression, ratio in ((None, 1.10), ("zstd", 1.0)):
            size = sum(tensor.nbytes for tensor in pack_tensors(tensors, compression=compression)[0].values())
            assert size <= ratio * limit, (density, compression, size / limit)


def test_the_limit_is_the_formula():
    half = torch.cat([torch.ones(500), torch.zeros(500)])
    assert storage_limit({"w": half}) == 125 + 2000  # one bit a weight, and 500 values
    assert storage_limit({"w": half.to(torch.bfloat16).reshape(10, 100)}) == 125 + 1000
    few = torch.zeros(1 << 20)
    few[:1024], few[2048:4096] = 1e-45, -0.0  # a denormal number is a value, a zero of either sign is none
    entropy = -(2**-10 * -10) - (1 - 2**-10) * torch.log2(torch.tensor(1 - 2**-10, dtype=torch.float64)).item()
    assert storage_limit({"w": few}) == int(2**17 * entropy) + 1 + 4096
    assert storage_limit({"zero": torch.zeros(99), "full": torch.ones(99), "none": torch.empty(0)}) == 396
    assert (
        storage_limit({"count": torch.zeros(7, dtype=torch.int64), "almost": torch.tensor([1.0] * 32 + [0.0])}) < 189
    )
    assert storage_limit({}) == 0


def test_rounded_values_are_said_to_be_and_nothing_else_changes(tmp_path):
    model = resnet()
    path = save_sparse(model, tmp_path / "rounded", value_dtype="fp16")
    found = load_sparse(tmp_path / "rounded")
    assert found.dtype == torch.float32
    index = json.loads(read_sparse_metadata(path)["index"])
    rounded = 0
    for (name, one), other in zip(model.state_dict().items(), found.state_dict().values(), strict=True):
        if name.removeprefix("timm_model.") in index:
            assert index[name.removeprefix("timm_model.")]["value_dtype"] == "float16"
            assert torch.equal(one.half().float(), other) and not torch.equal(one, other), name
            rounded += 1
        else:
            assert torch.equal(one, other), name
    assert rounded > 5
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="not this model's, rounded, and a folder holds one model"):
        save_sparse(model, tmp_path / "dense", value_dtype="fp16")
    assert not (tmp_path / "dense" / SPARSE_FILE).exists()


def test_rounding_says_what_it_can_not_do():
    with pytest.raises(ValueError, match="'w': 1 values are too large for float16, the first is 7e.04"):
        pack_tensors({"w": torch.tensor([7e4, *[0.0] * 99])}, value_dtype="fp16")
    with pytest.raises(ValueError, match="rounds nothing"):
        pack_tensors({"w": torch.zeros(99, dtype=torch.bfloat16)}, value_dtype="fp16")
    with pytest.raises(ValueError, match="value_dtype='int8'; use one of"):
        pack_tensors({"w": torch.zeros(99)}, value_dtype="int8")
    with pytest.raises(ValueError, match="compression='gzip'; use one of"):
        pack_tensors({"w": torch.zeros(99)}, compression="gzip")
    tiny = torch.tensor([1e-9, float("inf"), float("nan"), -0.0, 1.0, *[0.0] * 99])
    back = unpack_tensors(*pack_tensors({"w": tiny}, value_dtype="fp16"))["w"]
    assert torch.equal(back.nan_to_num(7.0), torch.tensor([0.0, torch.finfo().max, 7.0, 0.0, 1.0, *[0.0] * 99]))
    assert not back.signbit().any()


def test_without_zstandard_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = write_sparse_file({"w": sparse(200, 300)}, tmp_path / SPARSE_FILE, compression="zstd")
    other = write_sparse_file({"w": sparse(200, 300)}, tmp_path / "plain")
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name == "zstandard":
            raise ImportError("blocked")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    for use in (lambda: read_sparse_file(path), lambda: pack_tensors({"w": torch.zeros(9)}, compression="zstd")):
        with pytest.raises(ImportError, match=r"pip install 'tscnc-hf\[pack\]'"):
            use()
    assert torch.equal(read_sparse_file(other)["w"], sparse(200, 300))


def test_what_compresses_beyond_the_bound_is_not_compressed():
    """Else a reader could not tell it from a bomb."""
    packed, metadata = pack_tensors({"w": torch.zeros(4_000_000), "ones": torch.ones(4_000_000)}, compression="zstd")
    assert "gaps" not in json.loads(metadata["index"])["w"] and len(packed["w" + GAPS]) == 4_000_000 // 255
    found = unpack_tensors(packed, metadata)
    assert not found["w"].any() and bool((found["ones"] == 1).all())


@MODELS
def test_weights_are_bound_to_their_config(make, tmp_path):
    model = make()
    path = save_sparse(model, tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    digest = config_digest(tmp_path)
    for key, value, same in [
        ("dtype", "bfloat16", True), ("transformers_version", "9.9", True), ("tscnc", {"epsilon": 1}, True),
        ("_name_or_path", "x", True), ("hidden_act", "relu", False), ("num_attention_heads", 1, False),
        ("model_args", {"output_stride": 8}, False), ("pretrained_cfg", {"mean": [0, 0, 0]}, False),
        ("label_names", ["b", "a"], False),
    ]:  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(good | {key: value}))
        assert (config_digest(tmp_path) == digest) == same
        if not same:
            for load in (load_sparse, through_transformers):
                with pytest.raises(ValueError, match="another config.json"):
                    load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(good, indent=7))
    assert_same_weights(load_sparse(tmp_path), model)
    write_sparse_file(read_sparse_file(path), path)  # of nobody knows which config
    assert_same_weights(load_sparse(tmp_path), model)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="config.json: not a JSON object"):
        load_sparse(tmp_path)


def test_a_file_for_a_much_larger_model_is_not_decoded(tmp_path, monkeypatch):
    path = save_sparse(vit(), tmp_path)
    write_sparse_file(read_sparse_file(path) | {"more": torch.zeros(1_000_000)}, path)
    monkeypatch.setattr(loading, "build_exactly", lambda *_, **__: pytest.fail("was decoded"))
    with pytest.raises(ValueError, match="it holds 10[0-9]* elements; the model has between"):
        load_sparse(tmp_path)


def test_the_zeros_of_the_finished_model_are_counted(tmp_path, monkeypatch):
    save_sparse(vit(), tmp_path)

    def forgetful(*args, build=loading.build_exactly):
        model = build(*args)
        model.classifier.weight.data[3] = 0.5
        return model

    monkeypatch.setattr(loading, "build_exactly", forgetful)
    with pytest.raises(ValueError, match="values that are not zero, the model built from it"):
        load_sparse(tmp_path)


def through_transformers(folder, **options):
    return AutoModelForImageClassification.from_pretrained(
        folder, variant="sparse", quantization_config=tscnc_hf.SparseConfig(), **options
    )


@MODELS
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_transformers_loads_an_ordinary_model(make, compression, tmp_path):
    model = make()
    save_sparse(model, tmp_path / "packed", compression=compression)
    found = through_transformers(tmp_path / "packed")
    assert type(found) is type(model) and not found.training
    assert_same_weights(found, model)
    assert torch.equal(logits(found), logits(model))
    assert not found.is_quantized and not hasattr(found, "hf_quantizer")
    assert not hasattr(found.config, "quantization_config")
    found.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    other = make(1)
    load_weights(other, tmp_path / "dense")
    assert_same_weights(other, model)
    found.save_pretrained(tmp_path / "stock")
    assert_same_weights(AutoModelForImageClassification.from_pretrained(tmp_path / "stock"), model)
    half = through_transformers(tmp_path / "packed", dtype=torch.bfloat16)
    assert_same_weights(half, make().to(torch.bfloat16))
    found.train()(pixel_values=torch.rand(2, 3, 8, 8), labels=torch.tensor([1, 2])).loss.backward()
    assert all(p.grad is not None for p in found.parameters())


def test_transformers_never_loads_another_model(tmp_path):
    path = save_sparse(vit(), tmp_path)
    with pytest.raises(ValueError, match="is of another model than the ViTModel asked for"):
        ViTModel.from_pretrained(tmp_path, variant="sparse", quantization_config=tscnc_hf.SparseConfig())
    with pytest.raises((ValueError, RuntimeError)):
        through_transformers(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    tensors = read_sparse_file(path)
    name = "vit.encoder.layer.0.attention.attention.query.weight"
    write_sparse_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    with pytest.raises(ValueError, match="1 missing: vit.layers.0.attention.q_proj.weight"):
        through_transformers(tmp_path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(Exception, match="truncated or damaged|incomplete|InvalidHeader|MetadataIncomplete"):
        through_transformers(tmp_path)
    vit().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='Pass variant="sparse"'):
        AutoModelForImageClassification.from_pretrained(tmp_path, quantization_config=tscnc_hf.SparseConfig())


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import sys, tscnc_hf; assert not {'torch', 'transformers'} & set(sys.modules), 'slow'"
    run_command([sys.executable, "-c", code])


def test_versions_of_transformers_that_do_not_pass_the_model(tmp_path, monkeypatch):
    """To the hook in which the converters are made."""
    hook = SparseHfQuantizer.update_weight_conversions
    monkeypatch.setattr(
        SparseHfQuantizer, "update_weight_conversions", lambda self, conversions, model=None: hook(self, conversions)
    )
    model = vit()
    save_sparse(model, tmp_path)
    assert_same_weights(through_transformers(tmp_path), model)
