"""
Is a compiled model ever slower, or another function? `make bench-sweep`, on an idle machine.

Some twenty architectures of timm and transformers with random weights and 0, 50 and 90 % of them zero, drawn at random
in each layer; some also with gates folded, slimmed, or of the pattern 2:4. Each is compiled for one image and for
sixteen; model and copy are then timed in turns. The ratio is that of the medians, beside it quartiles of the ratios
within a turn; "=" is a copy that was left as the model was, whose ratio says how far the machine is from idle. Logits
are compared at 1, 3, 16, 17 and 64 images.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import transformers as hf
from torch import nn

from tscnc_hf import slim, sparse_compile
from tscnc_hf.inference.compiling import TOLERANCE
from tscnc_hf.inference.timing import interleaved, ratios
from tscnc_hf.method.adversarial.pixels import logits_of
from tscnc_hf.method.reports.report import markdown_table
from tscnc_hf.method.units.gates import attach_gates, fold_gates_
from tscnc_hf.method.units.groups import structure_groups


LIMIT = 1.03
SIZES = (1, 3, 16, 17, 64)


def of_timm(name: str, side: int = 96, **options) -> Callable[[], tuple[nn.Module, int]]:
    return lambda: (timm.create_model(name, num_classes=10, **options), side)


def of_transformers(kind: str, side: int = 64, **options) -> Callable[[], tuple[nn.Module, int]]:
    def make():
        config = getattr(hf, f"{kind}Config")(num_labels=10, **options)
        return getattr(hf, f"{kind}ForImageClassification")(config), side

    return make


SMALL = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "image_size": 64, "patch_size": 8}
ARCHITECTURES = {
    "resnet18": of_timm("resnet18"),
    "resnet50": of_timm("resnet50"),
    "resnext50_32x4d": of_timm("resnext50_32x4d"),
    "cifar_wrn40_4": of_timm("cifar_wrn40_4", 32),
    "vgg11_bn": of_timm("vgg11_bn", 32, mlp_ratio=1 / 16),
    "densenet121": of_timm("densenet121"),
    "mobilenetv3_small_100": of_timm("mobilenetv3_small_100"),
    "efficientnet_b0": of_timm("efficientnet_b0"),
    "regnety_004": of_timm("regnety_004"),
    "repvgg_a0": of_timm("repvgg_a0"),
    "ghostnet_100": of_timm("ghostnet_100"),
    "convnext_atto": of_timm("convnext_atto"),
    "vit_tiny": of_timm("vit_tiny_patch16_224", 96, img_size=96, patch_size=8),
    "deit3_small": of_timm("deit3_small_patch16_224", 96, img_size=96),
    "swin_tiny": of_timm("swin_tiny_patch4_window7_224", 112, img_size=112),
    "mixer_s32": of_timm("mixer_s32_224", 224),
    "poolformer_s12": of_timm("poolformer_s12"),
    "ViT": of_transformers("ViT", **SMALL),
    "BEiT": of_transformers("Beit", **SMALL),
    "ResNet": of_transformers("ResNet", depths=[2, 2, 2, 2], layer_type="basic", hidden_sizes=[64, 128, 256, 512]),
    "ConvNext": of_transformers("ConvNext", depths=[2, 2, 4, 2], hidden_sizes=[48, 96, 192, 384]),
}
VARIANTS_OF = ("resnet18", "vgg11_bn", "vit_tiny", "ViT", "ConvNext")


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def randomized(model: nn.Module) -> nn.Module:
    """As after training: no block that adds nothing, statistics that are not 0 and 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def pruned(model: nn.Module, zeros: float) -> nn.Module:
    for layer in layers_of(model):
        layer.weight[torch.rand_like(layer.weight) < zeros] = 0
    return model


def gated(model: nn.Module) -> nn.Module:
    for site in attach_gates(model):
        nn.init.uniform_(site.reader.gate.log_alpha, -3, 3)
    fold_gates_(model)
    return pruned(model, 0.5)


def slimmed(model: nn.Module, side: int) -> nn.Module:
    for group in structure_groups(model):
        keep = torch.arange(group.count) < max(1, group.count // 2)
        masks = group.unit_masks(keep)
        for part in group.weights:
            part.tensor.mul_(masks[part.name])
    return slim(pruned(model, 0.9), torch.randn(2, 3, side, side))[0]


def two_of_four(model: nn.Module) -> nn.Module:
    """The two smallest of four consecutive inputs of each output are zero."""
    for layer in layers_of(model):
        if layer.weight.shape[1] % 4 == 0:
            groups = layer.weight.unflatten(1, (-1, 4))
            groups.scatter_(2, groups.abs().topk(2, dim=2, largest=False).indices, 0.0)
    return model


def cases(names: list[str], zeros: list[float], variants: bool):
    """(architecture, what was done to it, model, side) of each case."""
    for name in names:
        for share in zeros:
            torch.manual_seed(0)
            model, side = ARCHITECTURES[name]()
            yield name, f"{share:.0%} zeros", pruned(randomized(model), share), side
        for kind in ("gates folded", "slimmed", "2:4") if variants and name in VARIANTS_OF else ():
            torch.manual_seed(0)
            model, side = ARCHITECTURES[name]()
            model = randomized(model)
            made = {"gates folded": gated, "2:4": two_of_four}
            yield name, kind, slimmed(model, side) if kind == "slimmed" else made[kind](model), side


def compared(model: nn.Module, fast: nn.Module, side: int) -> float:
    """The largest difference of logits over their range, at all SIZES."""
    worst = 0.0
    for size in SIZES:
        images = torch.randn(size, 3, side, side)
        expected = logits_of(model(images))
        worst = max(worst, float((logits_of(fast(images)) - expected).abs().max() / (expected.max() - expected.min())))
    return worst


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--zeros", nargs="+", type=float, default=[0.0, 0.5, 0.9])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each model and its copy")
    parser.add_argument("--variants", action=argparse.BooleanOptionalAction, default=True, help="gates, slimmed, 2:4")
    parser.add_argument("--json", type=Path, help="file of rows, one a case; what is in it is not measured again")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, {args.threads} threads, {torch.backends.cpu.get_cpu_capability()}\n", flush=True
    )
    rows = (
        [json.loads(line) for line in args.json.read_text().splitlines()] if args.json and args.json.exists() else []
    )
    known = {(row["architecture"], row["what"], row["batch"]) for row in rows}
    for name, what, model, side in cases(args.architectures, args.zeros, args.variants):
        for batch in args.batches:
            if (name, what, batch) in known:
                continue
            images, start = torch.randn(batch, 3, side, side), time.perf_counter()
            fast = sparse_compile(model, images)
            took = time.perf_counter() - start
            calls = {"model": lambda m=model, x=images: m(x), "fast": lambda m=fast, x=images: m(x)}
            times = interleaved(calls, args.seconds, least=10, most=2000)
            spread = ratios(times["fast"].calls, times["model"].calls).spread
            row = {
                "architecture": name, "what": what, "batch": batch, "model_ms": times["model"].median,
                "ratio": times["fast"].median / times["model"].median, "quartiles": spread,
                "sparse": fast.report.sparse_layers, "said": fast.report.said,
                "difference": compared(model, fast, side), "compiling_s": took,
            }  # fmt: skip
            rows.append(row)
            print(
                f"{name}, {what}, batch {batch}: {row['ratio']:.2f} ({spread[0]:.2f} to {spread[1]:.2f}) of "
                f"{row['model_ms']:.1f} ms, {row['sparse']} sparse layers, difference "
                f"{row['difference']:.0e}, compiled in {took:.0f} s",
                flush=True,
            )
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    columns = [(what, batch) for what in dict.fromkeys(row["what"] for row in rows) for batch in args.batches]
    same = [row for row in rows if row["said"].startswith("Left as it was")]
    other = [row for row in rows if row not in same]
    cells = {
        (row["architecture"], row["what"], row["batch"]): "=" if row in same else f"{row['ratio']:.2f}" for row in rows
    }
    head = ("architecture", *(f"{what}, batch {batch}" for what, batch in columns))
    table = [(name, *(cells.get((name, *column), "") for column in columns)) for name in args.architectures]
    print("\n" + markdown_table(head, table, text=("architecture",)))
    for name, kind in ((f"slowest (limit {LIMIT})", other), ("slowest of those left as they were", same)):
        if kind:
            worst = max(kind, key=lambda row: row["ratio"])
            place = f"{worst['architecture']}, {worst['what']}, batch {worst['batch']}"
            print(f"\n{name}: {worst['ratio']:.3f} ({place}), of {len(kind)}")
    far = max(rows, key=lambda row: row["difference"])
    print(f"furthest: {far['difference']:.1e} ({far['architecture']}, {far['what']}); limit {TOLERANCE}")


if __name__ == "__main__":
    main()
