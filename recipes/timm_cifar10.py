"""
Train any timm model adversarially, prune it, test it and pack it.

    accelerate launch recipes/timm_cifar10.py --config recipes/configs/timm_cifar10.yaml
    accelerate launch recipes/timm_cifar10.py --config recipes/configs/timm_cifar10.yaml --target_sparsity 0.99

Every option is in `--help`; the YAML file sets defaults, the command line wins.
"""

from dataclasses import dataclass, field

from tscnc_hf.cli.recipe import interruptible, load_data, parse, run
from tscnc_hf.cli.threads import set_cpu_threads
from tscnc_hf.training.config import json_option


@dataclass
class ModelArguments:
    """The timm model."""

    architecture: str = field(default="resnet18", metadata={"help": "timm's name of the model."})
    model_args: str = field(
        default="{}", metadata={"help": "Arguments of timm.create_model, as JSON (in YAML: a map)."}
    )
    pretrained: bool = field(default=False, metadata={"help": "Start from timm's weights (downloads them)."})

    def __post_init__(self):
        self.model_args = json_option("model_args", self.model_args)


@interruptible()
def main(args: list[str] | None = None) -> None:
    config, data_arguments, model_arguments = parse(ModelArguments, args)

    from tscnc_hf.artifact.models.building import timm_model

    set_cpu_threads(config.device, config.world_size, data_arguments.cpu_threads)
    data = load_data(data_arguments, config.seed)

    def build():
        options = {"model_args": model_arguments.model_args, "pretrained": model_arguments.pretrained}
        options |= data_arguments.of_model
        return timm_model(model_arguments.architecture, data.class_names, data.image_size, data.channels, **options)

    run(config, data_arguments, build, data)


if __name__ == "__main__":
    main()
