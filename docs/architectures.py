"""
Trains, prunes, saves, loads, slims and attacks a small network of each architecture; writes docs/architectures.md.

    python docs/architectures.py [NAME ...]    # those that have no row in docs/architectures.jsonl, or the named ones

A row is kept as soon as it is there, so that a run which was cut off goes on. A "no" must be a refusal with a reason
before the first step; anything else that goes wrong is a fault, and makes the command fail.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import nn
from transformers import AutoModelForImageClassification, PrinterCallback, ViTImageProcessor

from tscnc_hf import TSCNCConfig, TSCNCTrainer, evaluate_robustness, load_slim, load_sparse, slim
from tscnc_hf.artifact.files.atomic import atomic_file
from tscnc_hf.artifact.models.building import timm_model
from tscnc_hf.artifact.models.config import class_of, label_fields
from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.reports.sparsity import sparsity_report


HERE = Path(__file__).parent
ROWS, PAGE = HERE / "architectures.jsonl", HERE / "architectures.md"
CLASSES = ["cat", "dog", "bird"]
COLUMNS = ("train", "load", "packed", "units", "slim", "evaluate")
SPARSITY = 0.5

PREFACE = """\
<!-- Written by `python docs/architectures.py`; rows are in architectures.jsonl. -->

# Architectures

{} architectures of timm and transformers, small and with random weights, on random images: three steps with all
terms (TRADES, TSC, CNC, adversarial weight perturbation, weight average, half of the weights pruned); the folder
loaded by the stock library (timm's by both), and packed by `load_sparse`, to the same logits; an evaluation under
attack; three steps that prune whole units, and `slim` and `load_slim` to the same logits. A "no" is refused before
the first step, with the reason below the table.
"""

VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
STAGES = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
RESNET = {"channels": (16, 16, 32, 32), "layers": (1, 1, 1, 1)}
# timm's name -> side of the images in pixels, keyword arguments of timm.create_model
TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (32, RESNET),
    "resnet50": (32, RESNET),
    "seresnet18": (32, RESNET),
    "resnext50_32x4d": (32, RESNET | {"channels": (32, 32, 32, 32)}),
    "ecaresnet26t": (32, RESNET),
    "resnetv2_50": (32, {"channels": (16, 16, 32, 32), "layers": (1, 1, 1, 1)}),
    "resnetv2_50x1_bit": (32, {}),
    "eca_nfnet_l0": (32, {}),
    "vgg11_bn": (32, {"mlp_ratio": 1 / 64}),
    "densenet121": (32, {"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
    "regnetx_002": (32, {}),
    "regnety_002": (32, {}),
    "repvgg_a0": (32, {}),
    "mobileone_s0": (32, {}),
    "mobilenetv2_050": (64, {}),
    "mobilenetv3_small_050": (64, {}),
    "mobilenetv4_conv_small_050": (64, {}),
    "tf_efficientnet_lite0": (64, {}),
    "efficientnet_b0": (64, {}),
    "mixnet_s": (64, {}),
    "ghostnet_050": (64, {}),
    "dla46_c": (64, {}),
    "ese_vovnet19b_slim_dw": (64, {}),
    "convnext_atto": (64, STAGES),
    "convnextv2_atto": (64, STAGES),
    "inception_next_atto": (64, STAGES),
    "edgenext_xx_small": (64, {}),
    "fastvit_t8": (64, {}),
    "poolformer_s12": (64, {}),
    "mobilevit_xxs": (64, {}),
    "maxvit_rmlp_pico_rw_256": (64, {"img_size": 64, "embed_dim": (32, 32, 64, 64), "depths": (1, 1, 1, 1)}),
    "swin_tiny_patch4_window7_224": (
        32, {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4)},
    ),
    "vit_tiny_patch16_224": (32, VIT | {"img_size": 32}),
    "deit3_small_patch16_224": (32, VIT | {"img_size": 32}),
    "beit_base_patch16_224": (32, VIT | {"img_size": 32}),
    "eva02_tiny_patch14_224": (32, VIT | {"img_size": 32}),
    "cait_xxs24_224": (32, VIT | {"img_size": 32}),
    "xcit_nano_12_p16_224": (32, {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}),
    "mixer_s32_224": (64, {"img_size": 64}),
    "gmlp_ti16_224": (64, {"img_size": 64}),
    "pvt_v2_b0": (64, {"embed_dims": (16, 16, 32, 32), "num_heads": (1, 1, 2, 2)}),
    "levit_128s": (64, {"img_size": 64}),
}  # fmt: skip

TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
PATCHES = {"image_size": 32, "patch_size": 8}
PYRAMID = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
VISION = {"vision_config": TRANSFORMER | PATCHES, "text_config": TRANSFORMER | {"vocab_size": 64}}
# the name of a config in transformers without "Config" -> side of the images in pixels, its fields
TRANSFORMERS: dict[str, tuple[int, dict[str, Any]]] = {
    "ViT": (32, TRANSFORMER | PATCHES),
    "DeiT": (32, TRANSFORMER | PATCHES),
    "ViTMSN": (32, TRANSFORMER | PATCHES),
    "Beit": (32, TRANSFORMER | PATCHES),
    "Data2VecVision": (32, TRANSFORMER | PATCHES),
    "Dinov2": (32, {**TRANSFORMER, **PATCHES, "mlp_ratio": 2}),
    "Dinov2WithRegisters": (32, {**TRANSFORMER, **PATCHES, "mlp_ratio": 2}),
    "IJepa": (32, TRANSFORMER | PATCHES),
    "CLIP": (32, VISION),
    "Siglip": (32, VISION),
    "Swin": (32, SWIN),
    "Swinv2": (32, SWIN),
    "Hiera": (
        32,
        {"image_size": [32, 32], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "query_stride": [2, 2],
         "patch_size": [3, 3], "patch_stride": [2, 2], "patch_padding": [1, 1], "num_query_pool": 1,
         "masked_unit_size": [4, 4], "embed_dim_multiplier": 2.0},
    ),
    "FocalNet": (32, {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32]}),
    "ConvNext": (32, PYRAMID | {"image_size": 32}),
    "ConvNextV2": (32, PYRAMID | {"image_size": 32}),
    "ResNet": (32, PYRAMID | {"embedding_size": 8}),
    "RegNet": (32, PYRAMID | {"embedding_size": 8, "groups_width": 8}),
    "Bit": (32, {"hidden_sizes": [128] * 4, "depths": [1, 1, 1, 1], "embedding_size": 32}),
    "EfficientNet": (64, {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320}),
    "MobileNetV1": (64, {"image_size": 64, "depth_multiplier": 0.25}),
    "MobileNetV2": (64, {"image_size": 64, "depth_multiplier": 0.25}),
    "MobileViT": (
        64,
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 48],
         "num_attention_heads": 2},
    ),
    "PoolFormer": (64, PYRAMID),
    "Pvt": (32, {**PYRAMID, "image_size": 32, "num_attention_heads": [1, 1, 2, 2]}),
    "SwiftFormer": (64, {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32], "image_size": 64}),
    "Levit": (
        64,
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1],
         "key_dim": [8, 8, 8]},
    ),
    "Cvt": (64, {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}),
    "Segformer": (32, {**PYRAMID, "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16}),
}  # fmt: skip


class Fault(Exception):
    """Something other than a refusal before training."""


def names() -> list[str]:
    return [*TIMM, *TRANSFORMERS]


def build(name: str) -> tuple[nn.Module, object, int]:
    """Model, image processor and the side of its images."""
    torch.manual_seed(0)
    if name in TIMM:
        side, arguments = TIMM[name]
        return *timm_model(name, CLASSES, (side, side), model_args=arguments), side
    side, fields = TRANSFORMERS[name]
    config = getattr(transformers, f"{name}Config")(**fields, **label_fields(CLASSES))
    processor = ViTImageProcessor(size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    return class_of(config)(config), processor, side


def images(count: int, side: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(count, 3, side, side, generator=generator)
    return [{"pixel_values": x, "labels": index % len(CLASSES)} for index, x in enumerate(pixels)]


@torch.no_grad()
def logits(model: nn.Module, side: int) -> torch.Tensor:
    x = torch.stack([item["pixel_values"] for item in images(2, side)])
    return model.eval()(x).logits


def trained(name: str, folder: Path, **options: Any) -> TSCNCTrainer | str:
    """A trainer after three steps; or why it was refused before the first."""
    model, processor, side = build(name)
    usual = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "seed": 0, "use_cpu": True}
    usual |= {"pruning_start": 0.0, "pruning_end": 0.7, "pruning_interval": 1, "save_strategy": "no"}
    usual |= {"logging_steps": 1, "report_to": "none", "disable_tqdm": True}
    try:
        config = TSCNCConfig(str(folder), **usual | options)
        trainer = TSCNCTrainer(model, config, train_dataset=images(12, side), processing_class=processor)
    except ValueError as error:
        return str(error).replace(type(model).__name__, "the model")
    trainer.pop_callback(PrinterCallback)
    trainer.train()
    return trainer


def row(name: str, folder: Path) -> dict[str, Any]:
    """
    One row of the table: for each of `COLUMNS` "ok" and what was found, or why not.

    Raises:
        Fault: something went wrong that was not refused before training.
    """
    cells: dict[str, Any] = {"library": "timm" if name in TIMM else "transformers"}
    stage = "train"
    try:
        terms = {"objective": "trades", "adversary": "kl-pgd", "attack_steps": 1, "epsilon": 0.03, "awp_gamma": 0.005}
        terms |= {"tsc_weight": 1e-5, "cnc_weight": 1e-3, "ema_decay": 0.5, "target_sparsity": SPARSITY}
        trainer = trained(name, folder / "all", **terms)
        if isinstance(trainer, str):
            return cells | {column: "no" for column in COLUMNS} | {"why": trainer}
        model, side = trainer.model, images_side(name)
        cells["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        cells["weights"] = len(list(weight_matrices(model)))
        logged = trainer.state.log_history[0]
        lacking = {"natural_loss", "robust_loss", "tsc_loss", "cnc_loss"} - logged.keys()
        check(not lacking, f"no {', '.join(lacking)} in the log")
        report = sparsity_report(model)
        check(report.zeros == round(SPARSITY * report.prunable), f"{report.zeros} of {report.prunable} zeros")
        cells["train"] = "ok"
        stage = "load"
        trainer.save_model()
        expected = logits(model, side)
        check(bool(expected.isfinite().all()), "logits are not finite")
        same(logits(AutoModelForImageClassification.from_pretrained(folder / "all"), side), expected)
        if name in TIMM:
            own = timm.create_model(f"local-dir:{folder / 'all'}", pretrained=True).eval()
            with torch.no_grad():
                same(own(torch.stack([item["pixel_values"] for item in images(2, side)])), expected)
        cells["load"] = "ok"
        stage = "packed"
        same(logits(load_sparse(folder / "all"), side), expected)
        cells["packed"] = "ok"
        stage = "evaluate"
        found = evaluate_robustness(
            model, images(4, side), ["clean", "pgd-2"], epsilon=0.03, processing_class=trainer.processing_class,
            progress=False,
        )  # fmt: skip
        check([attack.n for attack in found.attacks] == [4, 4], "not all images were evaluated")
        cells["evaluate"] = "ok"
        stage = "units"
        units = trained(
            name, folder / "units", objective="natural", target_sparsity=0.03, pruning_structure="units"
        )  # fmt: skip
        if isinstance(units, str):
            return cells | {"units": "no", "slim": "no", "why": units}
        cells["units"] = "ok"
        stage = "slim"
        expected = logits(units.model, side)
        small, report = slim(units.model, torch.stack([item["pixel_values"] for item in images(2, side)]))
        check(report.removed > 0, f"no unit was cut out: {sorted({r.why for r in report.rows})}")
        close(logits(small, side), expected)
        small.save_pretrained(folder / "small")
        same(logits(load_slim(folder / "small"), side), logits(small, side))
        if report.config == "config":
            same(logits(AutoModelForImageClassification.from_pretrained(folder / "small"), side), logits(small, side))
        left = sum(r.left for r in report.rows if not r.why.startswith("one unit"))
        cells["slim"] = f"ok, {report.removed} units" + (f"; {left} dead ones left" if left else "")
        return cells
    except Exception as error:
        raise Fault(f"{name}, {stage}: {type(error).__name__}: {error}") from error


def images_side(name: str) -> int:
    return (TIMM | TRANSFORMERS)[name][0]


def check(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    check(torch.allclose(found, expected, rtol=0, atol=1e-5), f"logits {(found - expected).abs().max():.1e} off")


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    check(difference < 1e-3, f"logits {difference:.1e} of the largest off")


def table(rows: dict[str, dict[str, Any]]) -> str:
    """docs/architectures.md."""
    found = [(name, rows[name]) for name in names() if name in rows]
    lines = [
        PREFACE.format(len(found)),
        "| architecture | of | weights pruned | train | load | `load_sparse` | evaluate | prune units | `slim` |",
        "| --- | --- | ---: | --- | --- | --- | --- | --- | --- |",
    ]
    notes: list[str] = []
    for name, cells in found:
        mark = ""
        if why := cells.get("why"):
            if why not in notes:
                notes.append(why)
            mark = f" ({notes.index(why) + 1})"
        shown = [cells.get(column, "") for column in ("train", "load", "packed", "evaluate", "units", "slim")]
        shown = [f"no{mark}" if cell == "no" else cell for cell in shown]
        lines.append(f"| `{name}` | {cells['library']} | {cells.get('weights', 0)} | {' | '.join(shown)} |")
    lines += [""] + [f"{index}. {why}" for index, why in enumerate(notes, 1)]
    return "\n".join(lines).rstrip() + "\n"


def read_rows() -> dict[str, dict[str, Any]]:
    lines = ROWS.read_text(encoding="utf-8").splitlines() if ROWS.is_file() else []
    return {cells.pop("name"): cells for cells in map(json.loads, lines)}


def write(rows: dict[str, dict[str, Any]]) -> None:
    lines = [json.dumps({"name": name} | rows[name]) for name in names() if name in rows]
    for path, text in ((ROWS, "\n".join(lines) + "\n"), (PAGE, table(rows))):
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def main(wanted: list[str]) -> int:
    """The number of faults."""
    rows, faults = read_rows(), 0
    if unknown := set(wanted) - set(names()):
        raise SystemExit(f"unknown: {', '.join(unknown)}; known are {', '.join(names())}")
    for name in wanted or [name for name in names() if name not in rows]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows[name] = row(name, Path(folder))
            except Fault as fault:
                faults += 1
                print(fault, file=sys.stderr, flush=True)
                continue
        write(rows)
    return faults


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    raise SystemExit(min(main(sys.argv[1:]), 1))
