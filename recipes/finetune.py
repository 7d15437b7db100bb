"""
Train any image classifier on, adversarially, prune it, test it and pack it: a folder or a Hub id, dense or packed.

    accelerate launch recipes/finetune.py --config recipes/configs/finetune.yaml --model_name_or_path outputs/my-dense
    accelerate launch recipes/finetune.py --config recipes/configs/finetune.yaml --model_name_or_path you/sparse \\
        --target_sparsity 0 --keep_masks true

Images are resized to what the model takes, unless --image_size says otherwise; a model of another number of classes
gets a new head. Every option is in `--help`; the YAML file sets defaults, the command line wins.
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
    with one_line_errors():
        side, channels = input_format(name)
    given = {"image_size": data_arguments.image_size or side, "channels": channels or data_arguments.channels}
    data_arguments = replace(data_arguments, **given)
    data = load_data(data_arguments, config.seed)

    def build():
        with one_line_errors():
            model, processor, changes = load_for_finetuning(name, data.class_names, data.image_size)
        say(f"Model: {name}, {changes}")
        return model, processor

    run(config, data_arguments, build, data)


if __name__ == "__main__":
    main()
