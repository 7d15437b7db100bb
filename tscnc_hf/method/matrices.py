"""Which weights count, and how each is seen as a matrix. New layer types join by registration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from tscnc_hf.method.weight_use import why_computed
from tscnc_hf.method.wrappers import unwrapped


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, *CONVOLUTIONS)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


logger = logging.getLogger(__name__)

MatrixView = Callable[[nn.Module, Tensor], Tensor]

# module class -> parameter name -> view. Looked up along the method resolution order of the module's class.
_VIEWS: dict[type[nn.Module], dict[str, MatrixView]] = {}
_REPORTED: set[type[nn.Module]] = set()

# A fused projection does not say so in its class; these are the attribute names timm, torch and CLIP use for one.
FUSED_QKV_NAMES = ("qkv", "to_qkv", "in_proj", "Wqkv", "c_attn")

# Parts of the names of parameters that no layer multiplies features with.
NO_MATRIX = ("bias", "token", "pos", "embed", "scale")

# Never constrained nor pruned: these do not map features to features.
_LEFT_OUT = (
    ParametrizationList,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._BatchNorm,
)


@dataclass(frozen=True)
class WeightMatrix:
    """
    One prunable weight and its matrix view.

    Attributes:
        name (`str`): the parameter's name in this layer. What lies before the layers, such as an embedding, may have
            the same parameter, and `model.named_parameters()` its name for it.
        module (`nn.Module`): the layer that owns it.
        weight (`Tensor`): the parameter, any shape and floating dtype.
        view (`Callable`): maps a tensor of the weight's shape to its (b, r, c) matrices.
    """

    name: str
    module: nn.Module
    weight: Tensor
    view: Callable[[Tensor], Tensor]

    @property
    def matrices(self) -> Tensor:
        """(b, r, c) view of the weight in its own dtype, differentiable; sharded (DTensor) weights are gathered."""
        return self.view(full_tensor(self.weight))

    def __repr__(self) -> str:
        b, r, c = self.matrices.shape
        return f"{self.name}: {tuple(self.weight.shape)} as {b} x ({r}, {c})"


def full_tensor(weight: Tensor) -> Tensor:
    """The whole tensor of a sharded one (FSDP2's DTensor, differentiable), or the tensor itself."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def full_name(module_name: str, name: str) -> str:
    """Of a parameter, buffer or child of a module, as the model calls it."""
    return f"{module_name}.{name}" if module_name else name


def register_matrix_view(module_class: type[nn.Module], view: MatrixView, parameter: str = "weight") -> None:
    """
    Let a layer type take part in the constraints, in pruning and in the reports.

    Args:
        module_class (`type`): applies to its subclasses too, unless they have a view of their own.
        view (`Callable`): `(module, weight) -> (b, r, c)`, made of reshapes, transposes and slices only, so that it is
            differentiable and maps zeros to zeros.
        parameter (`str`, *optional*, defaults to `"weight"`): name of the parameter in the module; call once for each
            parameter of a class that has several.
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise TypeError(f"module_class={module_class!r}: give a class derived from torch.nn.Module")
    _VIEWS.setdefault(module_class, {})[parameter] = view


class WeightMatrices(Iterator[WeightMatrix]):
    """Iterator over `WeightMatrix`; printed, it lists what takes part, what is left out, and why."""

    def __init__(self, model: nn.Module, exclude: Sequence[str] = ()):
        model = unwrapped(model)
        self._model, self._excluded = model, _excluded(model, exclude)
        self._records = _find(model, self._excluded)

    def __next__(self) -> WeightMatrix:
        return next(self._records)

    def __repr__(self) -> str:
        found = {record.name: record for record in _find(self._model, self._excluded)}
        taken = {name: record for name, record in found.items() if record.weight.requires_grad}
        lines = [f"{len(taken)} weights are constrained and pruned:", *(f"  {taken[name]}" for name in taken), "not:"]
        computed = computed_weights(self._model)
        lines += [f"  {name}: {why}" for name, why in computed.items()]
        for module_name, module in self._model.named_modules():
            for parameter, weight in module._parameters.items():
                name = full_name(module_name, parameter)
                if weight is not None and name not in taken and name not in computed:
                    lines.append(f"  {name}: {tuple(weight.shape)}, {_why_not(name, module, weight, self._excluded)}")
        return "\n".join(lines)


def weight_matrices(model: nn.Module, exclude: Sequence[str] = ()) -> WeightMatrices:
    """
    The prunable weights of a model, each once (tied weights under their first name), in module order.

    Args:
        model (`nn.Module`): any model.
        exclude (`Sequence[str]`, *optional*): a weight is left out when one of these is a part of its name; one that
            is the whole name of a weight leaves out that weight alone.

    Returns:
        An iterator over `WeightMatrix`. `print(weight_matrices(model))` shows what is left out as well, and why.
        Frozen weights (requires_grad=False) are among them, for reports; training leaves them alone.
    """
    return WeightMatrices(model, exclude)


def computed_weights(model: nn.Module) -> dict[str, str]:
    """
    The weights of linear layers and convolutions that are neither constrained nor pruned nor reported on, because the
    layer multiplies with other numbers than it stores: name -> why. A class that is wrongly among them can be
    registered (`register_matrix_view`).
    """
    found = {
        full_name(name, "weight"): _why_computed(module)
        for name, module in model.named_modules()
        if isinstance(module, (*LAYERS, *_TRANSPOSED))
    }
    return {name: why for name, why in found.items() if why}


def _why_computed(module: nn.Module) -> str:
    """Empty for what is no linear layer or convolution, and for a class that somebody registered a view for."""
    owner = next((cls for cls in type(module).__mro__ if cls in _VIEWS), None)
    return why_computed(module) if owner in (*LAYERS, *_TRANSPOSED) else ""


def _excluded(model: nn.Module, parts: Sequence[str]) -> Callable[[str], bool]:
    """Whether a name is left out."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)} if parts else set()
    whole, inside = set(parts) & names, [part for part in parts if part not in names]
    return lambda name: name in whole or any(part in name for part in inside)


def _find(model: nn.Module, excluded: Callable[[str], bool]) -> Iterator[WeightMatrix]:
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        views = _views(module)
        if not views:
            _report_unknown(module_name, module)
        elif why := _why_computed(module):
            _report(module, f"{full_name(module_name, 'weight')} is neither constrained nor pruned: {why}")
            continue
        if views and not any(hasattr(module, parameter) for parameter in views):
            raise ValueError(
                f"{module_name or 'the model'} ({type(module).__name__}) has no parameter {' or '.join(views)}, for "
                f"which register_matrix_view was called; it has {', '.join(module._parameters) or 'none'}"
            )
        for parameter, view in views.items():
            name = full_name(module_name, parameter)
            if parameter not in module._parameters:
                if hasattr(module, parameter):  # an attention with a parametrization
                    _report(module, f"{name} is neither constrained nor pruned: computed from other parameters")
                continue
            weight = module._parameters[parameter]
            if weight is None or id(weight) in seen:
                continue
            seen.add(id(weight))
            if excluded(name):
                continue
            if isinstance(module, nn.Linear) and _is_fused(module_name, weight):
                view = _blocks_of_three
            yield WeightMatrix(name, module, weight, partial(_seen, name, module, view))


def _seen(name: str, module: nn.Module, view: MatrixView, weight: Tensor) -> Tensor:
    matrices = view(module, weight)
    if not isinstance(matrices, Tensor) or matrices.ndim != 3:
        found = tuple(matrices.shape) if isinstance(matrices, Tensor) else type(matrices).__name__
        raise ValueError(
            f"{name}: the matrix view of {type(module).__name__} makes {found} of a weight of {tuple(weight.shape)}; "
            "(b, r, c) is needed, one matrix as weight.flatten(1)[None]"
        )
    return matrices


def _views(module: nn.Module) -> dict[str, MatrixView]:
    return next((_VIEWS[cls] for cls in type(module).__mro__ if cls in _VIEWS), {})


def _why_not(name: str, module: nn.Module, weight: Tensor, excluded: Callable[[str], bool]) -> str:
    if excluded(name):
        return "excluded"
    if not weight.requires_grad:
        return "frozen (requires_grad=False), left alone while training"
    if isinstance(module, _LEFT_OUT):
        return "norm or embedding"
    parameter = name.rsplit(".", 1)[-1]
    if parameter != "weight" and isinstance(module, LAYERS) and _why_computed(module):
        return "what the weight is computed from"
    if weight.ndim < 2 or any(part in parameter for part in NO_MATRIX):
        return "bias, scale, position or token"
    return "tied to another weight" if _views(module) else f"no matrix view for {type(module).__name__}"


def _is_fused(module_name: str, weight: Tensor) -> bool:
    return module_name.rsplit(".", 1)[-1] in FUSED_QKV_NAMES and weight.shape[0] == 3 * weight.shape[1]


def _blocks_of_three(module: nn.Module, weight: Tensor) -> Tensor:
    return weight.reshape(3, -1, weight.shape[-1])


def _conv_transpose_view(module: nn.Module, weight: Tensor) -> Tensor:
    groups, (inputs, outputs) = module.groups, weight.shape[:2]
    return weight.reshape(groups, inputs // groups, outputs, -1).transpose(1, 2).reshape(groups, outputs, -1)


def unknown_weights(model: nn.Module) -> dict[str, str]:
    """
    The weights with two dimensions or more of layers that no matrix view is known for, which are neither constrained
    nor pruned nor reported on: name -> why. Norms, embeddings, biases, scales, positions and tokens are none of them.
    """
    return {
        full_name(module_name, parameter): f"no matrix view is known for {type(module).__name__}"
        for module_name, module in model.named_modules()
        if not _views(module)
        for parameter in _unknown(module)
    }


def _unknown(module: nn.Module) -> list[str]:
    if isinstance(module, _LEFT_OUT):
        return []
    return [
        name
        for name, weight in module._parameters.items()
        if weight is not None
        and sum(side > 1 for side in weight.shape) >= 2  # by its shape: a sharded one is not squeezed
        and not any(part in name for part in NO_MATRIX)
    ]


def _report_unknown(module_name: str, module: nn.Module) -> None:
    kind, names = type(module).__name__, _unknown(module)
    if not names:
        return
    more = "" if names[0] == "weight" else f", parameter={names[0]!r}"
    _report(
        module,
        f"{module_name or 'the model'} ({kind}, {names[0]} {tuple(module._parameters[names[0]].shape)}) is neither "
        "constrained nor pruned: no matrix view is known for it. To add one:\n"
        f"    tscnc_hf.method.matrices.register_matrix_view({kind}, lambda module, weight: weight.flatten(1)[None]"
        f"{more})",
    )


def _report(module: nn.Module, message: str) -> None:
    """Once for each class of modules."""
    if type(module) not in _REPORTED:
        _REPORTED.add(type(module))
        logger.warning(message)


register_matrix_view(nn.Linear, lambda module, weight: weight[None])
for _conv in CONVOLUTIONS:
    register_matrix_view(_conv, lambda module, weight: weight.reshape(module.groups, len(weight) // module.groups, -1))
for _conv in _TRANSPOSED:
    register_matrix_view(_conv, _conv_transpose_view)
register_matrix_view(nn.MultiheadAttention, _blocks_of_three, parameter="in_proj_weight")
for _name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):  # where key and value have sizes of their own
    register_matrix_view(nn.MultiheadAttention, lambda module, weight: weight[None], parameter=_name)
