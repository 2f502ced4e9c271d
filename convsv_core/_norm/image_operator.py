"""The part of a layer's operator on images that does not depend on how the layer is applied."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

from convsv_core._symbol.operand import Operand
from convsv_core.backend import Array

__all__ = ["ImageOperator"]


@dataclass(frozen=True)
class ImageOperator(ABC):
    """The linear operator of a layer on an image of fixed extents.

    Images are arrays of shape ``(*batch, groups, pixels, channels of a group)``, pixels in row-major order.

    Attributes
    ----------
    operand : Operand
        The kernel, at the operand's scale and in its computing dtype.
    transposed : bool
        Whether the operator is the adjoint of the forward convolution.
    """

    operand: Operand
    transposed: bool

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Groups, pixels and channels of a group in the images that `apply` takes."""
        return self._shapes[1 if self.transposed else 0]

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """Groups, pixels and channels of a group in the images that `apply` returns."""
        return self._shapes[0 if self.transposed else 1]

    def apply(self, images: Array) -> Array:
        """Return the outputs for `images`."""
        return self._convolve_adjoint(images) if self.transposed else self._convolve(images)

    def adjoint(self, images: Array) -> Array:
        """Apply the adjoint: ``<adjoint(y), x> == <y, apply(x)>``."""
        return self._convolve(images) if self.transposed else self._convolve_adjoint(images)

    def narrowed(self) -> Self:
        """Return the operator or its adjoint, whichever has no more inputs than outputs."""
        wide = math.prod(self.input_shape) > math.prod(self.output_shape)
        return dataclasses.replace(self, transposed=self.transposed != wide)

    @property
    @abstractmethod
    def _shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Return groups, pixels and channels of a group in the inputs and the outputs of the forward convolution."""

    @abstractmethod
    def _convolve(self, images: Array) -> Array:
        """Return the forward convolution of `images`."""

    @abstractmethod
    def _convolve_adjoint(self, images: Array) -> Array:
        """Return the adjoint of the forward convolution, applied to `images`."""
