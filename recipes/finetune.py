"""
Train any image classifier on, adversarially, prune it, test it and pack it: a folder or a Hub id, dense or packed.

    accelerate launch recipes/finetune.py --config recipes/configs/finetune.yaml --model_name_or_path outputs/my-dense
    accelerate launch recipes/finetune.py --config recipes/configs/finetune.yaml --model_name_or_path you/sparse \\
        --target_sparsity 0 --keep_masks true

Images are attacked at the size that they have (or --image_size), and the model's image processor resizes them to
what the model takes, inside of what is attacked; those that have no common size are brought to the model's before. A
model of another number of classes gets a new head. Every option is in `--help`; the YAML file sets defaults, the
command line wins.
"""

from dataclasses import dataclass, field, replace

from tscnc_hf.cli.recipe import interruptible, load_data, one_line_errors, parse, run, say
from tscnc_hf.cli.threads import set_cpu_threads


@dataclass
class ModelArguments:
    """The model to start from."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of an image classifier, dense or packed."})


@interruptible()
def main(args: list[str] | None = None) -> None:
    config, data_arguments, model_arguments = parse(ModelArguments, args)

    from tscnc_hf.artifact.models.config import input_format
    from tscnc_hf.artifact.models.finetuning import load_for_finetuning

    set_cpu_threads(config.device, config.world_size, data_arguments.cpu_threads)
    name = model_arguments.model_name_or_path
    if data_arguments.interpolation is not None:
        raise SystemExit("error: interpolation is that of the model's image processor: leave it out")
    with one_line_errors():
        side, channels = input_format(name)
    if channels is not None and data_arguments.channels not in ("auto", channels):
        raise SystemExit(f"error: channels={data_arguments.channels} but {name} takes {channels} images: leave it out")
    data_arguments = replace(data_arguments, channels=channels or data_arguments.channels)
    data = load_data(data_arguments, config.seed, photos=side)

    input_size = data_arguments.input_size
    input_size = (input_size, input_size) if isinstance(input_size, int) else input_size

    def build():
        with one_line_errors():
            model, processor, changes = load_for_finetuning(name, data.class_names, data.image_size, input_size)
        say(f"Model: {name}, {changes}")
        return model, processor

    run(config, data_arguments, build, data)


if __name__ == "__main__":
    main()
