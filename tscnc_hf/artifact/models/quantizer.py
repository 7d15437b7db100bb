"""Packed files through transformers' own door: `from_pretrained(name, variant="sparse", quantization_config=...)`.

transformers lets an `HfQuantizer` read a checkpoint of another layout. Ours quantises nothing: it reads the packed
file as `load_sparse` does, with every check, hands the dense tensors to the loader and leaves an ordinary model.
Importing this module registers it; whoever takes `tscnc_hf.SparseConfig` imports it, and `import tscnc_hf` stays fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tscnc_hf.artifact.models.loading import load_sparse
from tscnc_hf.artifact.models.weights import same_tensors
from tscnc_hf.artifact.packed.file import SPARSE_FILE
from tscnc_hf.artifact.packed.index import GAPS


METHOD = "tscnc_sparse"


@register_quantization_config(METHOD)
class SparseConfig(QuantizationConfigMixin):
    """Says that the weights asked for are a packed file. It has no options, and the loaded model does not keep it."""

    def __init__(self, **kwargs: Any):
        self.quant_method = METHOD
        self.dequantize = True  # transformers then removes this config from the loaded model, which is ordinary


class HandOut(ConversionOps):
    """Gives the loader the tensors of a finished state dict, whatever it has read itself."""

    hf_quantizer = True  # the loader then leaves dtypes alone

    def __init__(self, state: dict[str, torch.Tensor]):
        self.state = state

    def __deepcopy__(self, memo: dict) -> HandOut:
        return self  # the loader copies the operation for every tensor

    def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
        read = [tensor for found in input_dict.values() for tensor in (found if isinstance(found, list) else [found])]
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype
        return {full_layer_name: self.state[full_layer_name].to(read[0].device, dtype)}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


@register_quantizer(METHOD)
class SparseHfQuantizer(HfQuantizer):
    """Reads `model.sparse.safetensors`. Errors are those of `load_sparse`; a model that is not it is one, too."""

    requires_calibration = is_trainable = True

    def __init__(self, quantization_config: SparseConfig, **kwargs: Any):
        super().__init__(quantization_config, **(kwargs | {"pre_quantized": True}))
        self.path, self.model, self.state = Path(), None, {}

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        names = [Path(file).name for file in checkpoint_files or ()]
        if names != [SPARSE_FILE]:
            raise ValueError(
                f"SparseConfig reads {SPARSE_FILE}, but the weights asked for are {names}. "
                'Pass variant="sparse" with it, or leave quantization_config out for the dense weights.'
            )
        self.path, self.model = Path(checkpoint_files[0]), model

    def update_weight_conversions(self, weight_conversions, model=None):  # which not all versions pass
        model, self.model = self.model, None
        # not earlier: the hook above runs where new tensors are on the meta device
        self.state = load_sparse(self.path.parent).state_dict()
        if self.state.keys() != model.state_dict().keys():
            raise ValueError(
                f"{self.path} is of another model than the {type(model).__name__} asked for. Load it with "
                "AutoModelForImageClassification, or with tscnc_hf.load_sparse."
            )
        # every key of the file comes to `HandOut`: NAME as it is, and NAME.tscnc_gaps as NAME
        patterns = [GAPS.replace(".", r"\.") + "$", "$"]
        renamings = [conversion for conversion in weight_conversions if isinstance(conversion, WeightRenaming)]
        return [*renamings, WeightConverter(patterns, "", [HandOut(self.state)])]

    def _process_model_after_weight_loading(self, model, **kwargs):
        expected, self.state = self.state, {}
        for name, tensor in model.state_dict().items():
            if not same_tensors({name: tensor}, {name: expected[name].to(tensor.device, tensor.dtype)}):
                raise ValueError(
                    f"{name} is not what {SPARSE_FILE} holds: transformers did not load the packed weights as they "
                    "are. Leave out options that change the model, or use tscnc_hf.load_sparse."
                )
        return model

    def is_serializable(self) -> bool:
        return True
