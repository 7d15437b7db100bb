"""
What does each part do? Arms x sparsities x seeds with the same data order and adversary, a line of JSON for each cell.

    python recipes/ablation.py --config recipes/configs/ablation_cnn.yaml
    python recipes/ablation.py --config recipes/configs/ablation_cnn.yaml --check plain-0.99-s1
    python recipes/ablation_report.py --rows outputs/ablation.jsonl --output outputs/ablation

Started again it goes on where it was: finished cells are skipped. `--check` runs one cell anew and compares the rows.
Every option is in `--help`; the YAML file sets defaults, the command line wins.
"""

import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace

from tscnc_hf.artifact.card.formatting import format_kappa
from tscnc_hf.cli.recipe import check_test, command_line, interruptible, load_data, parse, resume_point
from tscnc_hf.cli.threads import set_cpu_threads
from tscnc_hf.training.config import json_option
from tscnc_hf.training.numbers import check_numbers


@dataclass
class AblationArguments:
    """The grid, and the model."""

    architecture: str = field(default="vit", metadata={"help": '"vit" (from config), or timm\'s name of a model.'})
    model_args: str = field(
        default="{}", metadata={"help": "Arguments of timm.create_model or of vit_from_config, as JSON (YAML: a map)."}
    )
    label: str | None = field(default=None, metadata={"help": "Name of the model in the results."})
    results: str = field(default="outputs/ablation.jsonl", metadata={"help": "File of rows, one a finished cell."})
    arms: str = field(
        default='{"plain": {}}', metadata={"help": "Name -> options of TSCNCConfig, as JSON (in YAML: a map)."}
    )
    sparsities: list[float] = field(default_factory=lambda: [0.95, 0.99], metadata={"help": "Fractions of zeros."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run of each cell a seed."})
    pretraining: str = field(
        default="null",
        metadata={"help": "Options of a dense training that every cell starts from, as JSON; null: none."},
    )
    split: str = field(
        default="test", metadata={"help": "What cells are measured on.", "choices": ("test", "validation")}
    )
    save_models: bool = field(default=False, metadata={"help": "Leave a publishable folder with a card a cell."})
    value_dtype: str | None = field(
        default=None,
        metadata={"help": "Round trained weights to it, and pack them so (zstandard).", "choices": ("fp16", "bf16")},
    )
    bundles: str | None = field(
        default=None, metadata={"help": "With save_models: a tar of each cell there, in parts of 15 MiB at most."}
    )
    workers: int = field(default=1, metadata={"help": "Cells run beside each other, each with cpu_threads threads."})
    time_limit: int = field(default=0, metadata={"help": "Stop, resumably, after so many seconds; 0: never."})
    check: str | None = field(default=None, metadata={"help": "Name of a finished cell: run it anew and compare."})
    only: list[str] = field(default_factory=list, metadata={"help": "Only cells whose names begin with one of these."})

    def __post_init__(self):
        check_numbers(self)
        for name in ("model_args", "arms", "pretraining"):
            setattr(self, name, json_option(name, getattr(self, name)))
            nothing = name == "pretraining" and self.pretraining is None
            if not (nothing or isinstance(getattr(self, name), dict)):
                raise ValueError(f"{name}={getattr(self, name)!r}: give a map, such as '{{\"name\": value}}'")
        if self.workers < 1:
            raise ValueError(f"workers={self.workers}: at least 1 cell runs at a time")
        if self.bundles and not self.save_models:
            raise ValueError(f"bundles={self.bundles!r} are of published folders: set save_models, too")
        if self.value_dtype and importlib.util.find_spec("zstandard") is None:
            raise ValueError(f"value_dtype={self.value_dtype!r} packs with zstandard: pip install 'tscnc-hf[pack]'")


def make_grid(config, data_arguments, arguments, command=None):
    """The `Grid` of the options, which were typed as `command`; data is read here, once a process."""
    from transformers.utils.logging import disable_progress_bar

    from tscnc_hf.artifact.models.building import timm_model, vit_from_config
    from tscnc_hf.training.ablation.grid import Grid

    disable_progress_bar()
    set_cpu_threads(config.device, config.world_size, data_arguments.cpu_threads)
    data = load_data(data_arguments, config.seed)
    check_test(config, data_arguments, data)

    def build():
        shape = (data.class_names, data.image_size, data.channels)
        if arguments.architecture == "vit":
            return vit_from_config(*shape, **arguments.model_args, **data_arguments.of_model)
        return timm_model(arguments.architecture, *shape, model_args=arguments.model_args, **data_arguments.of_model)

    about = {"architecture": arguments.architecture, "model_args": arguments.model_args} | data_arguments.of_model
    return Grid(
        config,
        build,
        data,
        arguments.label or arguments.architecture,
        arguments.split,
        data_arguments.test_attacks,
        data_arguments.test_limit if arguments.split == "test" else None,
        arguments.save_models,
        about,
        data_arguments.test_full,
        data_arguments.attack_precision,
        arguments.value_dtype,
        arguments.bundles,
        command,
    )


_grid = None  # of a worker process


def start_worker(*options) -> None:
    global _grid
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))  # else a pool's worker would go on with the next cell
    sys.stdout = open(os.devnull, "w")  # the parent says what there is to say
    _grid = make_grid(*options)


def run_in_worker(cell):
    return outcome(_grid, cell)


def outcome(grid, cell):
    """The row of a cell, or the error that it ended with: the others are to go on."""
    try:
        return cell, grid.run(cell)
    except Exception as error:
        return cell, f"{type(error).__name__}: {error}"


def run_cells(parts, workers: int, options, grid):
    """Yield outcomes as cells finish, part by part: in this process, or in several beside each other."""
    if workers == 1:
        for cell in (cell for part in parts for cell in part):
            print(f"{cell.name} ...", flush=True)
            yield outcome(grid, cell)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, max(map(len, parts))), context, start_worker, options) as pool:
        try:
            for part in parts:
                for done in as_completed([pool.submit(run_in_worker, cell) for cell in part]):
                    yield done.result()
        except BaseException:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def say(row: dict, done: int, total: int, start: float, begun: int) -> None:
    left = (time.perf_counter() - start) / max(done - begun, 1) * (total - done) / 60
    shown = ", ".join(f"{name} {value:.1%}" for name, value in row["accuracy"].items())
    shown += ", collapsed" if row.get("collapsed") else ""
    trained = "" if row["seconds"] is None else f", trained in {row['seconds']:.0f} s"
    print(
        f"[{done}/{total}] {row['arm']} at {row['sparsity']:.2%}, seed {row['seed']}: {shown}, median kappa "
        f"{format_kappa(row['median_kappa'])}, {row['lost_ranks']} ranks lost{trained}; {left:.0f} min left",
        flush=True,
    )


@interruptible()
def main(args: list[str] | None = None) -> None:
    options = (*parse(AblationArguments, args), command_line())
    config, data_arguments, arguments, _ = options
    if config.world_size > 1:
        raise SystemExit("error: each cell is one process; run several beside each other with --workers")
    if resume_point(config, data_arguments) not in (True, False):
        raise SystemExit("error: each cell goes on from its own checkpoint: leave resume_from_checkpoint out")

    from tscnc_hf.training.ablation.bundle import check_names
    from tscnc_hf.training.ablation.grid import grid as grid_of
    from tscnc_hf.training.ablation.grid import selected
    from tscnc_hf.training.ablation.rows import Results, differences

    try:
        cells = grid_of(arguments.arms, arguments.sparsities, arguments.seeds, arguments.pretraining)
        results, grid = Results(arguments.results), make_grid(*options)
        grid.progress = arguments.workers == 1  # bars of cells beside each other would be a jumble
        kept = selected(cells, arguments.only)
        found = {cell: results.find(grid.label, cell, grid.fingerprint(cell), grid.split) for cell in kept}
        broken = grid.unreachable([cell for cell in kept if found[cell] is None])
        first = [cell for cell in kept if found[cell] is None and cell not in broken]
        first = grid.untrained(cells, first)  # what those start from
        found |= {cell: results.find(grid.label, cell, grid.fingerprint(cell), grid.split) for cell in first}
        if arguments.bundles:
            check_names([cell.name for cell in found])
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if arguments.check is not None:
        cell = next((cell for cell in kept if cell.name == arguments.check and found[cell]), None)
        if cell is None:
            raise SystemExit(f"error: {arguments.results} has no finished cell {arguments.check!r} of these settings")
        folder = f"{config.output_dir}-check-{os.getpid()}"
        again = replace(grid, config=replace(grid.config, output_dir=folder), bundles=None)
        if cell.pretraining is not None:
            again.run(again.dense(cell))
        if different := differences(found[cell], again.run(cell)):
            raise SystemExit(f"{cell.name} was not reproduced: {different}")
        print(f"{cell.name} gives the same row again")
        return
    todo = [cell for cell in cells if cell in first or (cell in found and found[cell] is None and cell not in broken)]
    begun, start = len(found) - len(todo) - len(broken), time.perf_counter()
    done = begun

    def stop():
        try:
            print(f"time limit: {done} of {len(found)} cells are finished, the same command goes on", flush=True)
        finally:  # also where nobody reads what is printed
            os.kill(os.getpid(), signal.SIGTERM)

    print(f"{len(found)} cells, {begun} of them finished before; rows in {arguments.results}", flush=True)
    if arguments.workers > 1:  # else the trainer has its own way to end, with a checkpoint
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    timer = threading.Timer(arguments.time_limit, stop)
    timer.daemon = True
    if arguments.time_limit:
        timer.start()
    parts = [[cell for cell in todo if cell.is_dense], [cell for cell in todo if not cell.is_dense]]  # those first
    failed = [f"{cell.name}: {type(error).__name__}: {error}" for cell, error in broken.items()]
    for text in failed:
        print(f"FAILED {text}", flush=True)
    try:
        for cell, row in run_cells(parts, arguments.workers, options, grid) if todo else ():
            if isinstance(row, str):
                failed.append(f"{cell.name}: {row}")
                print(f"FAILED {failed[-1]}", flush=True)
                continue
            if found[cell] is None:
                results.add(row)
            done += 1
            say(row, done, len(found), start, begun)
            if found[cell] is not None:  # its weights were not there
                different = differences(found[cell], row) or "nothing"
                print(f"{cell.name} was trained again; from its row, which stays, differs {different}", flush=True)
    finally:
        timer.cancel()
    if failed:
        raise SystemExit(
            f"error: {len(failed)} of {len(found)} cells failed, the others are kept; {'; '.join(failed)}"
        )


if __name__ == "__main__":
    main()
