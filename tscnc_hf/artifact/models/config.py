"""The config of a model, by name or folder, without running what a repository brings along."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, TimmWrapperConfig


NOT_OURS = {
    "num_classes", "checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay",
}  # fmt: skip


def read_config(name_or_folder: str | os.PathLike, **options: Any) -> PreTrainedConfig:
    """
    `AutoConfig.from_pretrained`, but never with code of the repository, and also for what timm itself writes.

    timm's `push_to_hf_hub` (1.0.31) records `num_classes` among the arguments of the model, transformers (5.24) passes
    it beside them, and no such model can be built: it is taken out, `num_labels` says the same. So are arguments with
    which timm would load other files: a downloaded config is not to choose them.

    Raises:
        OSError: there is no such config. ValueError: it is of no known architecture, or needs code to be run.
    """
    config = AutoConfig.from_pretrained(name_or_folder, trust_remote_code=False, **options)
    if isinstance(config, TimmWrapperConfig) and config.model_args:
        config.model_args = {key: value for key, value in config.model_args.items() if key not in NOT_OURS}
    return config
