"""
Train a small Vision Transformer adversarially, prune it, test it and pack it.

    accelerate launch recipes/vit_cifar10.py --config recipes/configs/vit_cifar10.yaml
    python recipes/vit_cifar10.py --config recipes/configs/vit_digits_demo.yaml --target_sparsity 0.95

Every option is in `--help`; the YAML file sets defaults, the command line wins.
"""

from dataclasses import dataclass, field

from tscnc_hf.cli.recipe import interruptible, load_data, parse, run
from tscnc_hf.cli.threads import set_cpu_threads


@dataclass
class ModelArguments:
    """The Vision Transformer."""

    patch_size: int = field(default=4, metadata={"help": "Side of a patch in pixels."})
    hidden_size: int = field(default=192, metadata={"help": "Width."})
    num_hidden_layers: int = field(default=9, metadata={"help": "Depth."})
    num_attention_heads: int = field(default=3, metadata={"help": "Heads."})
    mlp_ratio: float = field(default=2.0, metadata={"help": "Width of the MLP over the width of the model."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout in attention and MLP."})


@interruptible()
def main(args: list[str] | None = None) -> None:
    config, data_arguments, model_arguments = parse(ModelArguments, args)

    from tscnc_hf.artifact.models.building import vit_from_config

    set_cpu_threads(config.device, config.world_size, data_arguments.cpu_threads)
    data = load_data(data_arguments, config.seed)

    def build():
        options = vars(model_arguments) | data_arguments.of_model
        return vit_from_config(data.class_names, data.image_size, data.channels, **options)

    run(config, data_arguments, build, data)


if __name__ == "__main__":
    main()
