"""`tscnc`: one command for what needs no script. Thin: each calls functions of the rooms and shows the result."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from tscnc_hf import __version__
from tscnc_hf.cli.refusing import first_to_say


BROKEN_PIPE = 128 + 13  # what a shell says of a program that this signal has ended
EXIT_CODES = "exit codes: 0 done, 1 refused (the reason is on stderr), 2 wrong usage"
# command -> (what it does, an example)
COMMANDS = {
    "inspect": (
        "what a model is: architecture, sparsity, condition numbers, sizes, accuracies it claims",
        "tscnc inspect you/your-model --layers",
    ),
    "pack": (
        "write the packed model.sparse.safetensors from dense weights, bit for bit",
        "tscnc pack outputs/my-model",
    ),
    "unpack": (
        "write model.safetensors from a packed file, bit for bit",
        "tscnc unpack you/your-model --output dense-model",
    ),
    "evaluate": (
        "clean and robust accuracy of any image classifier",
        "tscnc evaluate --model outputs/my-model --dataset uoft-cs/cifar10 --attacks clean pgd-20 autoattack --n 1000",
    ),
    "card": (
        "write README.md and its figures again from what lies in the folder",
        "tscnc card outputs/my-model --results outputs/my-model-robustness/results.json",
    ),
    "bench": (
        "how long a forward pass takes on this CPU: in every runtime that is installed, and with its zeros skipped",
        "tscnc bench outputs/my-model --batch 1 64 --threads 2",
    ),
    "export": (
        "write an ONNX file, for other runtimes, and check it with onnxruntime",
        "tscnc export outputs/my-model --output my-model.onnx",
    ),
    "push": (
        "upload a folder to the Hub in one commit, with its card",
        "tscnc push outputs/my-model you/your-model --private",
    ),
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command named first. SystemExit: code 1 and one line on stderr if it is refused, 2 for wrong usage."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        if args[:1] == ["evaluate"]:  # its options are those of the recipes, with --config
            from tscnc_hf.cli.evaluate import evaluate_model, parse

            epilog = f"example: {COMMANDS['evaluate'][1]}  ({EXIT_CODES})"
            options = parse(args[1:], prog="tscnc evaluate", epilog=epilog)
            with _to_whoever_reads():
                evaluate_model(options)
        else:
            options = _parser().parse_args(args or ["--help"])
            work, show = RUN[options.command]
            with redirect_stdout(sys.stderr):
                result = work(options)
            with _to_whoever_reads():
                if options.json:
                    print(json.dumps(result, allow_nan=False))
                else:
                    show(options, result)
    except SystemExit as end:
        if not isinstance(end.code, str):
            raise
        _refuse(end.code)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, OSError, ImportError) as error:  # the message says what to do; a traceback would hide it
        _refuse(f"error: {error}")


def _refuse(reason: str) -> None:
    if first_to_say(reason):
        print(" ".join(_printable(reason).split()), file=sys.stderr)
    raise SystemExit(1) from None


@contextmanager
def _to_whoever_reads() -> Iterator[None]:
    """A reader who has seen enough, as `head` has, ends the command without a word, as it ends others."""
    try:
        yield
        print(end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python writes the rest as it ends
        raise SystemExit(BROKEN_PIPE) from None


def _printable(text: str) -> str:
    """Without what a terminal would act on: a downloaded file may say anything."""
    return "".join(sign if sign.isprintable() else " " if sign.isspace() else "" for sign in text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tscnc",
        description="Sparse, adversarially robust vision models: look at them, pack them, attack them, publish them.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"tscnc-hf {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    made = {}
    for name, (what, example) in COMMANDS.items():
        made[name] = one = commands.add_parser(
            name,
            help=what,
            description=f"{what[0].upper()}{what[1:]}.",
            epilog=f"example: {example}\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in ("inspect", "pack", "unpack", "card", "bench", "export"):
            one.add_argument("model", metavar="FOLDER_OR_HUB_ID", help="of transformers or timm, dense or packed")
            one.add_argument("--revision", help="branch, tag or commit on the Hub")
        if name in ("pack", "unpack", "card"):
            one.add_argument("--output", metavar="FOLDER", help="where to write. Default: beside what is read")
        one.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else")

    packing = made["pack"]
    packing.add_argument("--compression", choices=("zstd",), help="compress further, without loss (pip: zstandard)")
    packing.add_argument("--value-dtype", choices=("fp16", "bf16"), help="round values: half as large, another model")
    made["inspect"].add_argument("--layers", action="store_true", help="also every weight and every matrix")
    made["inspect"].add_argument("--no-spectrum", action="store_true", help="leave singular values out: faster")
    looked = "what pruning to this sparsity by magnitude would leave of each layer, e.g. 0.95"
    made["inspect"].add_argument("--target", type=float, metavar="SPARSITY", help=looked)
    made["inspect"].add_argument(
        "--scope", choices=("global", "uniform", "erk"), default="global", help="how --target shares zeros out"
    )
    card = made["card"]
    card.add_argument("--results", metavar="FILE", help="results.json of `tscnc evaluate`; copied beside the card")
    card.add_argument("--name", help="what a reader loads. Default: the name of the folder, or the Hub id")
    card.add_argument("--dataset", help="Hub id or name of the data. Default: as recorded")
    noted = "a sentence that a reader of the figures needs, e.g. what was done to the images; may be given again"
    card.add_argument("--note", action="append", metavar="TEXT", help=noted)
    card.add_argument("--base-model", help="Hub id that training started from. Default: as recorded")
    card.add_argument("--license", help="identifier of the licence, e.g. apache-2.0. Default: as recorded")
    card.add_argument("--overwrite", action="store_true", help="also a README.md that this library did not write")
    for name in ("bench", "export"):
        made[name].add_argument(
            "--image-size",
            type=_positive,
            nargs="+",
            metavar="N",
            help="side, or height and width, of what the model gets, in pixels. Default: its own",
        )
    bench = made["bench"]
    bench.add_argument(
        "--batch", type=_positive, nargs="+", default=[1, 64], metavar="N", help="images of a call. Default: 1 64"
    )
    bench.add_argument(
        "--threads", type=_positive, metavar="N", help="of every runtime. Default: as many as torch takes"
    )
    bench.add_argument("--runtimes", nargs="+", metavar="NAME", help="by default all that are installed")
    bench.add_argument("--seconds", type=_positive, default=10, metavar="N", help="for each batch size. Default: 10")
    bench.add_argument("--save", action="store_true", help="keep it in the folder's latency.json, for inspect")
    export = made["export"]
    export.add_argument("--format", choices=("onnx",), default="onnx", help="of the file. Default: onnx")
    export.add_argument("--output", metavar="FILE", help="default: model.onnx beside what is read")
    push = made["push"]
    push.add_argument("folder", metavar="FOLDER", help="a model of transformers or timm, dense or packed")
    push.add_argument("repo_id", metavar="REPO_ID", help="owner/name on the Hub; made if it is not there")
    push.add_argument("--private", action="store_true", help="make the repository private; refuse a public one")
    push.add_argument("--revision", help="branch to commit to, made if it is not there. Default: main")
    push.add_argument("--message", default="Upload model", help="of the commit")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _inspect(options: argparse.Namespace) -> dict[str, Any]:
    from tscnc_hf.artifact.repository.inspection import inspect_model
    from tscnc_hf.artifact.repository.opening import open_repository

    repository = open_repository(options.model, options.revision)
    how = {"target": options.target, "scope": options.scope}
    return inspect_model(repository, layers=options.layers, spectrum=not options.no_spectrum, **how)


def _show_model(options: argparse.Namespace, found: dict[str, Any]) -> None:
    from tscnc_hf.artifact.repository.inspection import layer_rows, summary_rows, target_rows

    _table(summary_rows(found))
    if options.layers:
        print()
        _table(layer_rows(found), header=True)
    if options.target is not None:
        print()
        _table(target_rows(found), header=True)


def _convert(options: argparse.Namespace) -> dict[str, Any]:
    from tscnc_hf.artifact.packed.limit import count_minus_zeros
    from tscnc_hf.artifact.repository.conversion import pack, unpack
    from tscnc_hf.artifact.repository.opening import folder_sizes, open_repository, read_tensors

    packing = options.command == "pack"
    repository = open_repository(options.model, options.revision, weights="dense" if packing else "packed")
    how = {"compression": options.compression, "value_dtype": options.value_dtype} if packing else {}
    path = (pack if packing else unpack)(repository, options.output, **how)
    done = {"written": str(path)} | repository.sizes | folder_sizes(path.parent)
    if packing and (minus := count_minus_zeros(read_tensors(repository.folder).values())):
        done["minus_zeros"] = minus
    return done


def _show_sizes(options: argparse.Namespace, done: dict[str, Any]) -> None:
    from tscnc_hf.artifact.card.formatting import format_bytes

    sizes = {key: format_bytes(done[key]) for key in ("dense_bytes", "sparse_bytes") if key in done}
    text = f"{done['written']}: dense {sizes.get('dense_bytes', '-')}, packed {sizes.get('sparse_bytes', '-')}"
    text += f" ({done['sparse_bytes'] / done['dense_bytes']:.1%} of it)" if len(sizes) == 2 else ""
    print(text + (f"; {done['minus_zeros']:,} weights were -0.0 and are 0.0" if "minus_zeros" in done else ""))


def _card(options: argparse.Namespace) -> dict[str, Any]:
    from tscnc_hf.artifact.repository.opening import open_repository
    from tscnc_hf.artifact.repository.recard import rebuild_card

    given = {"model_name": options.name, "dataset_name": options.dataset}
    given |= {"notes": options.note, "base_model": options.base_model, "license": options.license}
    path = rebuild_card(
        open_repository(options.model, options.revision),
        options.output,
        results_file=options.results,
        overwrite=options.overwrite,
        **{key: value for key, value in given.items() if value is not None},
    )
    return {"written": str(path)}


def _push(options: argparse.Namespace) -> dict[str, Any]:
    from tscnc_hf.artifact.repository.recard import publish

    how = {"message": options.message, "revision": options.revision, "private": options.private or None}
    commit = publish(options.folder, options.repo_id, **how)
    return {"url": commit.commit_url, "commit": commit.oid}


def _bench(options: argparse.Namespace) -> dict[str, Any]:
    from tscnc_hf.cli.deployment import bench_model

    return bench_model(options)


def _show_latency(options: argparse.Namespace, found: dict[str, Any]) -> None:
    from tscnc_hf.cli.deployment import latency_rows

    _table(latency_rows(found), header=True)


def _export(options: argparse.Namespace) -> dict[str, Any]:
    from tscnc_hf.cli.deployment import export_model

    return export_model(options)


# command -> what does it, with all output on stderr, and what shows its result to people on stdout
RUN = {
    "inspect": (_inspect, _show_model),
    "pack": (_convert, _show_sizes),
    "unpack": (_convert, _show_sizes),
    "bench": (_bench, _show_latency),
    "export": (_export, lambda _, done: print(done["written"])),
    "card": (_card, lambda _, done: print(done["written"])),
    "push": (_push, lambda _, done: print(done["url"])),
}


def _table(rows: Sequence[Sequence[str]], header: bool = False) -> None:
    """Columns, the first to the left and the others to the right; with colour and lines on a terminal."""
    rows = [[_printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=header, pad_edge=False, **({} if header else {"box": None}))
        for index, name in enumerate(rows[0]):
            table.add_column(Text(name), justify="right" if index and header else "left")
        for row in rows[header:]:
            table.add_row(*map(Text, row))  # which it takes as it is: brackets are no markup
        Console().print(table)
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
