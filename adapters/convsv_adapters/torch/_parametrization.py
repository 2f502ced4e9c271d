"""A parametrization of a convolution's weight by its operator norm."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.weak import WeakTensorKeyDictionary

from convsv_adapters._layers import check_bound, geometry_of
from convsv_adapters.torch._layers import CONVOLUTIONS, conv_layers, without_autocast
from convsv_adapters.torch._norms import NormOf, can_share, norm_of
from convsv_adapters.torch._operators import Number, compiled_number, conv_arguments, in_compiler, register
from convsv_adapters.torch._shared_norms import Asked, asked_for, shared_norm
from convsv_core import Conv
from convsv_core.layers import Extents, circular_geometry

__all__ = ["OperatorNorm", "operator_norm"]

Mode = Literal["bound", "normalise"]
"""How a weight is scaled: see `OperatorNorm`."""


class _Owner:
    """Stand for a stored weight where norms are shared: compiled calls do not tell the parametrization."""


_owners: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@functools.lru_cache(maxsize=256)
def _geometry(conv: tuple[Any, ...], input_shape: Extents | None, rtol: float) -> NormOf:
    """Return the norm of a geometry that is given by its arguments."""
    return NormOf(Conv(*conv), input_shape, rtol)


def _asked(weight: torch.Tensor, which: NormOf) -> Asked | None:
    """Return what stands for a weight where norms are shared, or None for a tensor that is no copy of a known one."""
    if not isinstance(weight, nn.Parameter):
        return asked_for(weight, which)
    owner = _owners.get(weight)
    if owner is None:
        owner = _owners[weight] = _Owner()
    return Asked(owner, weight)


def _known_norm(weights: list[torch.Tensor], differentiated: list[bool], *geometry: Any) -> Number | None:
    """Return the norm of a stored weight, computed with those of other weights of its shape, or None elsewhere."""
    (weight,), (derivative,) = weights, differentiated
    which = _geometry(*geometry)
    if not (which.shareable and can_share(weight)) or weight.is_complex():
        return None
    asked = _asked(weight, which)
    if asked is None:
        return None
    with torch.set_grad_enabled(derivative):
        known = shared_norm(asked.owner, asked.weight, which)
    if not derivative:
        return Number(torch.tensor(known.norm), [])
    if known.slope is None:  # The weight is frozen, and has the entries of another one.
        return None
    # A graph may write to what an operator returns, so it gets a copy.
    return Number(torch.tensor(known.norm), [torch.empty(weight.shape, dtype=weight.dtype).copy_(known.slope)])


@register(known=_known_norm)
def layer_norm(
    weights: list[torch.Tensor], conv: tuple[Any, ...], input_shape: Extents | None, rtol: float
) -> torch.Tensor:
    """Return the norm of the one weight, for a geometry that is given by its arguments."""
    (weight,) = weights
    with without_autocast(weight):
        return norm_of(weight, _geometry(conv, input_shape, rtol))


class OperatorNorm(nn.Module):  # type: ignore[misc]
    """Parametrization of a convolution's weight by its operator norm, for `torch.nn.utils.parametrize`.

    The norm is computed from the weight alone, at each forward pass. There are no buffers, no iterations that continue
    from one pass to the next, and no difference between training and evaluation. On the CPU, the first layer in a
    pass has the norms of the other layers computed too. They are kept with a copy of the weights, and used while the
    weights are equal to this copy.

    Parameters
    ----------
    conv : Conv
        Geometry of the layer, with its own padding.
    input_shape : tuple of int, optional
        Spatial extents of the layer's input, for the norm of `convsv_core.operator_norm`. Without it, the norm is the
        upper bound for every input size of `convsv_core.norm_upper_bound`.
    bound : float, default 1.0
        Positive and finite.
    mode : {"bound", "normalise"}, default "bound"
        "bound": multiply the weight by ``min(1, bound / norm)``. "normalise": by ``bound / norm``.
    rtol : float, default 0.1
        Without `input_shape`, the relative gap between the upper bound and the norm: see
        `convsv_core.norm_upper_bound`.

    Raises
    ------
    ValueError
        `bound` is not positive, or there is no such `mode`.

    Notes
    -----
    Differentiable. The zero weight stays zero. Autocast is off for the norm. The result has the weight's dtype, and
    is within the bound to the rounding of this dtype. An assignment to the weight stores the assigned value, which
    reads back scaled. `torch.compile` keeps the norm in its graph as one operator, with a first derivative.

    Examples
    --------
    >>> from convsv_core import norm_bounds
    >>> layer = nn.Conv2d(8, 8, 3, padding=1)
    >>> norm = OperatorNorm(Conv("OIHW", padding=1, padding_mode="zeros"), bound=0.5)
    >>> _ = parametrize.register_parametrization(layer, "weight", norm)
    >>> bool(norm_bounds(layer.weight, norm.conv).lower <= 0.5)
    True
    """

    def __init__(
        self,
        conv: Conv,
        input_shape: Extents | None = None,
        bound: float = 1.0,
        mode: Mode = "bound",
        *,
        rtol: float = 0.1,
    ) -> None:
        super().__init__()
        bound = check_bound(bound, positive=True)
        if mode not in ("bound", "normalise"):
            raise ValueError(f"mode={mode!r}: wanted 'bound' or 'normalise'")
        self.conv, self.input_shape, self.bound, self.mode, self.rtol = conv, input_shape, bound, mode, rtol

    def norm(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the norm of a weight, or its upper bound: a 0-d tensor, differentiable."""
        if in_compiler():
            return compiled_number([weight], "layer_norm", conv_arguments(self.conv), self.input_shape, self.rtol)
        with without_autocast(weight):
            return norm_of(weight, self._which)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the scaled weight; on the meta device, where there are no values, a weight of the same shape."""
        if weight.is_meta:
            return weight.clone()
        if torch.onnx.is_in_onnx_export():
            raise RuntimeError(
                "ONNX has no operators for the norm of a convolution: before the export, store the scaled weight by "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
            )
        which = self._which
        if which.shareable and can_share(weight) and not weight.is_complex():
            known = shared_norm(self, weight, which)
            quotient = known.norm / type(known.norm)(self.bound)
            # The divisor's derivative is 0 where the bound leaves the weight as it is, and for a zero weight.
            moves = known.norm > 0 and (self.mode == "normalise" or quotient >= 1)
            divisor = float(quotient) if moves else 1.0
            if known.slope is None:
                return weight / divisor
            return _Scaled.apply(weight, divisor, known.slope if moves else None, self)
        norm = self.norm(weight)
        with without_autocast(weight):
            return (weight / self.divisor(norm)).to(weight.dtype)

    @property
    def _which(self) -> NormOf:
        return NormOf(self.conv, self.input_shape, self.rtol)

    def divisor(self, norm: torch.Tensor) -> torch.Tensor:
        """Return the number by which a weight of a norm is divided."""
        divisor = norm / self.bound
        if self.mode == "bound":
            return torch.clamp(divisor, min=1.0)
        return torch.where(norm > 0, divisor, torch.ones_like(divisor))

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the tensor to store when `weight` is assigned: the assigned tensor."""
        return weight

    def extra_repr(self) -> str:
        """Return the arguments, for the module's repr."""
        return f"{self.conv}, input_shape={self.input_shape}, bound={self.bound}, mode={self.mode!r}"


class _Scaled(torch.autograd.Function):  # type: ignore[misc]
    """Divide a weight by its divisor, for a norm whose derivative is known.

    One function for the forward pass and one for the backward pass take less time than the functions that PyTorch would
    record. A second derivative comes from these.
    """

    @staticmethod
    def forward(
        context: Any, weight: torch.Tensor, divisor: float, slope: torch.Tensor | None, owner: OperatorNorm
    ) -> torch.Tensor:
        """Return the scaled weight. `slope` is the derivative of the norm, or None for a divisor that is constant."""
        context.save_for_backward(weight)
        context.divisor, context.slope, context.owner = divisor, slope, owner
        return weight / divisor

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Return the derivative by the weight."""
        (weight,) = context.saved_tensors
        owner: OperatorNorm = context.owner
        with without_autocast(weight):
            if torch.is_grad_enabled():  # A second derivative is wanted.
                scaled = (weight / owner.divisor(owner.norm(weight))).to(weight.dtype)
                (found,) = torch.autograd.grad(scaled, weight, gradient, create_graph=True)
                return found, None, None, None
            if context.slope is None:
                return gradient / context.divisor, None, None, None
            wide = torch.promote_types(weight.dtype, torch.float32)
            product = torch.dot(gradient.reshape(-1).to(wide), weight.reshape(-1).to(wide))
            along = float(product) / (context.divisor * owner.bound)
            found = torch.add(gradient, context.slope, alpha=-along).div_(context.divisor)
        return found, None, None, None


def operator_norm(
    module: nn.Module,
    input_shape: Extents | None = None,
    bound: float = 1.0,
    mode: Mode = "bound",
    *,
    circular: bool = False,
    rtol: float = 0.1,
) -> nn.Module:
    """Parametrise a convolution's weight by its operator norm, which `torch.nn.utils.spectral_norm` does not find.

    Parameters
    ----------
    module : torch.nn.Module
        A convolution of PyTorch. Its attributes give the geometry.
    input_shape, bound, mode, rtol
        As for `OperatorNorm`. With an `input_shape` and padding that is not circular, each pass finds the norm by an
        iteration.
    circular : bool, default False
        With an `input_shape`, take the norm of the circular convolution, as in the paper, which has a closed form.

    Returns
    -------
    torch.nn.Module
        `module`; `torch.nn.utils.parametrize.remove_parametrizations` undoes it.

    Raises
    ------
    TypeError
        `module` is no convolution.
    NotImplementedError
        Its padding repeats pixels, and there is no `input_shape`.

    Examples
    --------
    >>> layer = operator_norm(nn.Conv2d(8, 8, 3, padding=1), bound=0.5)
    >>> list(layer.state_dict())
    ['bias', 'parametrizations.weight.original']
    """
    if not isinstance(module, CONVOLUTIONS):
        raise TypeError(f"module is a {type(module).__qualname__}: wanted a convolution, such as torch.nn.Conv2d")
    (layer,) = conv_layers(module)
    conv = geometry_of(layer)
    if circular:
        if input_shape is None:
            raise ValueError("circular=True: wanted an input_shape for the circular convolution")
        input_shape, conv = circular_geometry(conv, tuple(input_shape))
    parametrize.register_parametrization(module, "weight", OperatorNorm(conv, input_shape, bound, mode, rtol=rtol))
    return module
