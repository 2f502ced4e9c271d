"""
A critic whose Lipschitz constant is certified
==============================================

The critic of a Wasserstein GAN has to be 1-Lipschitz. Then the difference of its means on two sets of images is at
most the distance of the two distributions. The usual way to this is `spectral_norm` on every layer, which divides by
the norm of the reshaped kernel. That is not the norm of the layer, so the difference can exceed the distance.

Here the distance is known. The second set holds the images of the first, all moved by one fixed image, so that the
distance of the two distributions is the norm of that image.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from convsv_adapters.torch import SpectrumMonitor, project_after_step
from sklearn.datasets import load_digits
from torch.nn.utils.parametrizations import spectral_norm

torch.manual_seed(0)
real = torch.tensor(load_digits().images[:, None] / 16, dtype=torch.float32)
shift = torch.full((1, 1, 8, 8), 0.125)
distance = float(shift.norm())
print("the distance of the two distributions:", distance)


# %%
# Two critics begin with the same weights. `spectral_norm` is right for the fully connected layer, which is its reshaped
# matrix, so both critics have it there. They differ in their convolutions.
def make_critic():
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1),
        torch.nn.LeakyReLU(0.2),
        torch.nn.Conv2d(16, 16, 3, padding=1),
        torch.nn.LeakyReLU(0.2),
        torch.nn.Flatten(),
        spectral_norm(torch.nn.Linear(16 * 64, 1), n_power_iterations=2),
    )


def train(critic, after_step=None):
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    if after_step is not None:
        after_step(optimizer)
    differences = []
    for _ in range(250):
        batch = real[torch.randint(len(real), (64,))]
        loss = critic(batch).mean() - critic(batch + shift).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        differences.append(-loss.item())
    return differences


usual = make_critic()
for layer in usual[0], usual[2]:
    spectral_norm(layer)
usual_differences = train(usual)

# %%
# The certified critic has one line more: after each step, every convolution is brought within the bound.
certified = make_critic()
certified_differences = train(certified, lambda optimizer: project_after_step(optimizer, certified, bound=1.0))

# %%
# The norms of the layers say why. The product of the norms, with the fully connected layer's, bounds the critic's
# Lipschitz constant.
for name, critic in ("spectral_norm", usual), ("certified", certified):
    critic.eval()
    monitor = SpectrumMonitor(critic)
    monitor.measure()
    norms = [layer.certified_norm for layer in monitor.measurements[-1].layers]
    constant = float(np.prod(norms) * torch.linalg.matrix_norm(critic[-1].weight.detach(), 2))
    print(f"{name}: norms of the convolutions {np.round(norms, 3)}, the product {constant:.3f}")
assert constant <= 1.001

figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
axes.plot(usual_differences, label="spectral_norm on each layer")
axes.plot(certified_differences, label="each layer's norm certified to be at most 1")
axes.axhline(distance, color="black", linestyle="--", label="the distance itself")
axes.set_xlabel("step")
axes.set_ylabel("difference of the critic's means")
axes.legend()
axes.spines[["top", "right"]].set_visible(False)

# %%
# The certified critic cannot exceed the distance. It reaches two thirds of it, as each layer loses a little: a bound
# of 1 on the product allows no more. The usual critic reports seven times a distance that is there only once.
assert max(certified_differences) <= distance * 1.01
assert usual_differences[-1] > distance
