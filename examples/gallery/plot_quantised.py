"""
How far quantisation and pruning move a network
===============================================

A layer with other weights differs from the original by another convolution: the one of the difference of the weights.
The norm of that convolution is the largest change of the layer's output, for inputs of norm 1. So it says how much a
quantised or pruned layer can differ, for every input and not only for those of a test set.
"""

from importlib.resources import files

import matplotlib.pyplot as plt
import numpy as np

import convsv_core as convsv
from convsv_core.reports import read_model

# %%
# The network that comes with the package has seven convolutions.
layers = read_model(files("convsv_adapters") / "data" / "digits.onnx")
print([layer.name for layer in layers])


def quantise(kernel, bits, axes):
    """Round to a grid of `bits` bits, with one step for all taps or for each output channel."""
    largest = np.abs(kernel).max(axis=axes, keepdims=True)
    step = largest / (2 ** (bits - 1) - 1)
    return np.round(kernel / step) * step


def prune(kernel, share):
    """Set the smallest taps to zero."""
    return np.where(np.abs(kernel) >= np.quantile(np.abs(kernel), share), kernel, 0)


def relative_change(layer, kernel):
    """Return the certified norm of the change over the norm of the layer."""
    change = convsv.norm_bounds(kernel - layer.kernel, layer.conv).upper
    return float(change / convsv.norm_bounds(layer.kernel, layer.conv).lower)


# %%
# Every figure is an upper bound for every input size, rounding included.
bits = [3, 4, 5, 6, 7, 8]
whole = [[relative_change(one, quantise(one.kernel, count, None)) for one in layers] for count in bits]
channels = [[relative_change(one, quantise(one.kernel, count, (1, 2, 3))) for one in layers] for count in bits]
shares = [0.1, 0.2, 0.3, 0.5, 0.7, 0.9]
pruned = [[relative_change(one, prune(one.kernel, share)) for one in layers] for share in shares]
for count, one, other in zip(bits, whole, channels, strict=True):
    print(f"{count} bits: at most {max(one):.2%} with one step for a layer, {max(other):.2%} with one for a channel")

for share, one in zip(shares, pruned, strict=True):
    print(f"{share:.0%} of the taps set to zero: at most {max(one):.2%}, median {np.median(one):.2%}")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
left.semilogy(bits, np.max(whole, axis=1), "o-", label="one step for a layer, largest")
left.semilogy(bits, np.median(whole, axis=1), "o--", color="C0", label="median of the layers")
left.semilogy(bits, np.max(channels, axis=1), "s-", color="C1", label="one step for a channel, largest")
left.semilogy(bits, np.median(channels, axis=1), "s--", color="C1", label="median of the layers")
left.set_xlabel("bits")
left.set_ylabel("norm of the change over norm of the layer")
right.semilogy(shares, np.max(pruned, axis=1), "o-", color="C2", label="largest")
right.semilogy(shares, np.median(pruned, axis=1), "o--", color="C2", label="median of the layers")
right.set_xlabel("share of taps set to zero")
for panel in left, right:
    panel.legend(fontsize=8)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)

# %%
# Each bit about halves the change. Setting a half of the taps to zero moves a layer about as far as rounding it to
# three to four bits.
assert np.max(whole[-1]) < np.max(whole[0]) / 8
