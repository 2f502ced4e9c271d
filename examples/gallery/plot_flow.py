"""
A normalising-flow layer: log determinant and inverse
=====================================================

A circular convolution with as many inputs as outputs is a square matrix. Its log determinant is the sum of the
logarithms of all singular values, which `log_abs_det` computes with a gradient. Its inverse is one small linear
system for each frequency. So a convolution can be a layer of a normalising flow without any restriction on its taps.
"""

import math

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import convsv_core as convsv

torch.manual_seed(0)

# %%
# The images have 8 x 8 pixels. Each class of pixels modulo 2 becomes a channel, which leaves four channels of 4 x 4.
images = torch.tensor(load_digits().images[:, None] / 8 - 1, dtype=torch.float64)
images = images + torch.rand_like(images) / 8  # the grey levels are discrete: noise gives them a density
data = torch.nn.functional.pixel_unshuffle(images, 2)
data = data - data.mean(0)
extents, conv = (4, 4), convsv.Conv("OIHW")


def forward(kernel, batch):
    return torch.nn.functional.conv2d(torch.nn.functional.pad(batch, (1, 1, 1, 1), mode="circular"), kernel)


def inverse(kernel, batch):
    """Solve the layer's equations at each frequency."""
    symbol = convsv.symbol(kernel, extents, conv)[..., 0, :, :]  # one matrix for each frequency, of the only group
    spectrum = torch.fft.fft2(batch).permute(2, 3, 1, 0)
    return torch.fft.ifft2(torch.linalg.solve(symbol, spectrum).permute(3, 2, 0, 1)).real


# %%
# Training maximises the likelihood of the data, if the layer's outputs are independent and normal.
kernel = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
kernel[range(4), range(4), 1, 1] = 1.0
kernel.requires_grad_()
optimizer = torch.optim.Adam([kernel], lr=0.03)
losses = []
for _ in range(150):
    batch = data[torch.randint(len(data), (256,))]
    outputs = forward(kernel, batch)
    energy = 0.5 * outputs.square().flatten(1).sum(1).mean() + 32 * math.log(2 * math.pi)
    loss = (energy - convsv.log_abs_det(kernel, extents, conv)) / 64 / math.log(2)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"bits for each pixel: {losses[0]:.2f} before, {losses[-1]:.2f} after")

# %%
# The determinant agrees with the dense matrix, and the inverse takes every image back.
with torch.no_grad():
    basis = torch.eye(64, dtype=torch.float64).reshape(64, 4, 4, 4)
    dense = forward(kernel, basis).reshape(64, 64)
    exact = float(torch.linalg.slogdet(dense).logabsdet)
    ours = float(convsv.log_abs_det(kernel, extents, conv))
    error = float((inverse(kernel, forward(kernel, data)) - data).abs().max())
    print(f"log determinant {ours:.10f}, of the dense matrix {exact:.10f}; largest error of the inverse {error:.1e}")
    samples = inverse(kernel, torch.randn(8, 4, 4, 4, dtype=torch.float64))
assert abs(ours - exact) <= 1e-9 * max(1.0, abs(exact))
assert error <= 1e-9

figure = plt.figure(figsize=(9, 4.6), layout="constrained")
upper, lower = figure.subfigures(2, 1, height_ratios=(1.2, 1))
axes = upper.subplots()
axes.plot(losses)
axes.set_xlabel("step")
axes.set_ylabel("bits for each pixel")
axes.spines[["top", "right"]].set_visible(False)
panels = lower.subplots(2, 8)
for row, title, batch in zip(panels, ("data", "samples"), (data[:8], samples), strict=True):
    for panel, image in zip(row, torch.nn.functional.pixel_shuffle(batch, 2), strict=True):
        panel.imshow(image[0], cmap="gray", vmin=-1.5, vmax=1.5)
        panel.set_xticks([])
        panel.set_yticks([])
    row[0].set_ylabel(title)

# %%
# One linear layer models the correlations of neighbouring pixels, and no more. A flow has many such layers with
# nonlinear ones between them, and the penalty `convsv_core.penalties.negative_log_abs_det` is the term of the loss.
assert losses[-1] < losses[0]
