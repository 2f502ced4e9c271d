"""Train the small network that ships with convsv, on scikit-learn's digits, and write it as ONNX.

The 1797 images of the ten digits have 8 x 8 pixels each; a quarter of them is held out for the test. The
network has every kind of convolution that ``convsv spectrum`` has to report: a plain one, a depthwise and a
pointwise one in a residual block, a dilated one, a strided one, and a grouped and a pointwise one in a
second residual block. It has no normalisation, so the layers apply the kernels of a checkpoint unchanged.

The script needs PyTorch, scikit-learn, onnx, click and safetensors, and takes less than a minute. The first command
writes the model that the package ships; the second writes elsewhere and keeps checkpoints::

    python examples/train_digits.py
    python examples/train_digits.py digits.onnx --save-every 100 --run-dir run

With one thread, two runs with the same options on the same machine write the same bytes. The hyperparameters
are fixed, and the weights of the last step are kept: nothing is chosen by the test images.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DEFAULT_OUTPUT", "DigitsNet", "Split", "accuracy", "load_split", "main", "to_onnx", "train"]

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "adapters" / "convsv_adapters" / "data" / "digits.onnx"
OPSET = 17
IR_VERSION = 8
"""ONNX 1.12 introduced this version with `OPSET`, so a runtime that knows the operator set reads the file."""

BATCH_SIZE = 64
PEAK_LEARNING_RATE = 4e-3
WEIGHT_DECAY = 1e-2
"""Constants of the training. A guess."""

TOLERANCE_FACTOR = 16
"""The largest difference between ONNX's and torch's logits, in eps of the largest logit.

Measured: sums in another order, through eight layers, differ by 1 to 2. A wrong weight or attribute gives millions.
"""


class Split(NamedTuple):
    """Training and test images of the digits: float32 (n, 1, 8, 8) in [0, 1]. Their labels are int64 (n,)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_split() -> Split:
    """Return the digits with a quarter of each class held out; every call holds out the same images."""
    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    labels = digits.target.astype(np.int64)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=0
    )
    return Split(train_images, train_labels, test_images, test_labels)


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of rows of `logits` (n, 10) whose largest entry is at the label (n,)."""
    return float(np.mean(logits.argmax(axis=1) == labels))


class DigitsNet(nn.Module):
    """Seven convolutions, global average pooling and a linear head: (n, 1, 8, 8) to logits (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.block1 = nn.ModuleDict(
            {"depthwise": nn.Conv2d(16, 16, 3, padding=1, groups=16), "pointwise": nn.Conv2d(16, 16, 1)}
        )
        self.dilated = nn.Conv2d(16, 32, 3, padding=2, dilation=2)
        self.down = nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.block2 = nn.ModuleDict(
            {"grouped": nn.Conv2d(64, 64, 3, padding=1, groups=4), "pointwise": nn.Conv2d(64, 64, 1)}
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits. `to_onnx` writes the same graph by hand: keep both in step."""
        x = F.relu(self.stem(images))
        x = F.relu(x + self.block1["pointwise"](F.relu(self.block1["depthwise"](x))))
        x = F.relu(self.dilated(x))
        x = F.relu(self.down(x))
        x = F.relu(x + self.block2["pointwise"](F.relu(self.block2["grouped"](x))))
        return self.head(x.mean(dim=(2, 3)))


def save_checkpoint(model: nn.Module, run_dir: Path, step: int) -> None:
    """Write the state dict as ``run_dir/step_000123.safetensors``, with the step in the file's metadata too."""
    save_file(model.state_dict(), run_dir / f"step_{step:06d}.safetensors", metadata={"step": str(step)})


def train(
    split: Split, *, epochs: int, seed: int, save_every: int | None = None, run_dir: Path | None = None
) -> DigitsNet:
    """Train a `DigitsNet` on the training part and return it in evaluation mode.

    With `save_every`, the state dict is written to `run_dir` at step 0, after every `save_every`-th step of the
    optimiser, and after the last step.
    """
    torch.manual_seed(seed)
    model = DigitsNet()
    images, labels = torch.from_numpy(split.train_images), torch.from_numpy(split.train_labels)
    steps = epochs * -(-len(images) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    if save_every is not None and run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_checkpoint(model, run_dir, 0)
    step = 0
    for epoch in range(1, epochs + 1):
        total_loss = 0.0
        for rows in torch.randperm(len(images)).split(BATCH_SIZE):
            # Each batch is shifted by up to one pixel, in place of more data.
            top, left = torch.randint(3, (2,)).tolist()
            shifted = F.pad(images[rows], (1, 1, 1, 1))[:, :, top : top + 8, left : left + 8]
            loss = F.cross_entropy(model(shifted), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            total_loss += loss.item() * len(rows)
            if save_every is not None and run_dir is not None and (step % save_every == 0 or step == steps):
                save_checkpoint(model, run_dir, step)
        if epoch % 10 == 0 or epoch == epochs:
            click.echo(f"epoch {epoch:3d}  step {step:5d}  training loss {total_loss / len(images):.4f}", err=True)
    return model.eval()


def to_onnx(model: DigitsNet, *, doc_string: str, metadata: dict[str, str]) -> onnx.ModelProto:
    """Return the network as an ONNX model with a symbolic batch size, whose nodes have the names of torch's modules.

    Raises ``onnx.checker.ValidationError`` or ``onnx.shape_inference.InferenceError`` on a malformed graph.
    """
    nodes: list[onnx.NodeProto] = []
    initializers: list[onnx.TensorProto] = []

    def parameter(name: str) -> str:
        initializers.append(numpy_helper.from_array(model.state_dict()[name].numpy(), name))
        return name

    def node(op: str, name: str, *inputs: str, **attributes: int | list[int]) -> str:
        nodes.append(helper.make_node(op, list(inputs), [f"{name}.out"], name=name, **attributes))
        return f"{name}.out"

    def conv(name: str, x: str) -> str:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        return node(
            "Conv",
            name,
            x,
            parameter(f"{name}.weight"),
            parameter(f"{name}.bias"),
            kernel_shape=list(layer.kernel_size),
            strides=list(layer.stride),
            dilations=list(layer.dilation),
            pads=[*layer.padding, *layer.padding],
            group=layer.groups,
        )

    def conv_relu(name: str, x: str) -> str:
        return node("Relu", f"{name}.relu", conv(name, x))

    def residual(name: str, first: str, second: str, x: str) -> str:
        branch = conv(f"{name}.{second}", conv_relu(f"{name}.{first}", x))
        return node("Relu", f"{name}.relu", node("Add", f"{name}.add", x, branch))

    x = conv_relu("stem", "image")
    x = residual("block1", "depthwise", "pointwise", x)
    x = conv_relu("dilated", x)
    x = conv_relu("down", x)
    x = residual("block2", "grouped", "pointwise", x)
    x = node("Flatten", "flatten", node("GlobalAveragePool", "pool", x), axis=1)
    head = [parameter("head.weight"), parameter("head.bias")]
    nodes.append(helper.make_node("Gemm", [x, *head], ["logits"], name="head", transB=1))

    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        initializers,
    )
    proto = helper.make_model(
        graph,
        producer_name="convsv",
        doc_string=doc_string,
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET)],
    )
    helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def check_against_torch(proto: onnx.ModelProto, images: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest error of onnxruntime's logits, in units of eps times the largest logit.

    Raises ``click.ClickException`` if the error is above ``TOLERANCE_FACTOR``.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": images})
    unit = np.finfo(np.float32).eps * np.abs(expected).max()
    error = float(np.abs(logits - expected).max() / unit)
    if not error <= TOLERANCE_FACTOR:  # also when it is NaN
        raise click.ClickException(
            f"ONNX and torch differ by {error:.3g} eps of the largest logit; {TOLERANCE_FACTOR} is allowed"
        )
    return error


@click.command(
    help="Train a CNN on scikit-learn's digits, and write it to OUTPUT as ONNX (default: the package's own file)."
)
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path), default=DEFAULT_OUTPUT)
@click.option("--epochs", type=click.IntRange(min=1), default=60, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Threads for torch: 1 gives the same bytes in every run, 0 leaves the choice to torch.",
)
@click.option("--save-every", type=click.IntRange(min=1), metavar="N", help="Keep a checkpoint every N steps.")
@click.option("--run-dir", type=click.Path(file_okay=False, path_type=Path), help="Folder for the checkpoints.")
def main(output: Path, epochs: int, seed: int, threads: int, save_every: int | None, run_dir: Path | None) -> None:
    """Train and test the network, compare ONNX with torch, and write the file."""
    if (save_every is None) != (run_dir is None):
        raise click.UsageError("--save-every and --run-dir go together: give both or neither")
    torch.use_deterministic_algorithms(True)
    if threads:
        torch.set_num_threads(threads)

    split = load_split()
    model = train(split, epochs=epochs, seed=seed, save_every=save_every, run_dir=run_dir)
    with torch.inference_mode():
        logits = model(torch.from_numpy(split.test_images)).numpy()
    test_accuracy = accuracy(logits, split.test_labels)
    click.echo(f"test accuracy {test_accuracy:.4f} on {len(logits)} held-out images")

    script = f"examples/{Path(__file__).name}"
    proto = to_onnx(
        model,
        doc_string=(
            f"A small CNN for scikit-learn's 8x8 digits, pixels scaled to [0, 1]; trained by {script}; "
            f"accuracy {test_accuracy:.4f} on {len(logits)} held-out images."
        ),
        metadata={
            "test_accuracy": f"{test_accuracy:.4f}",
            "test_images": str(len(logits)),
            "training_script": script,
            "epochs": str(epochs),
            "seed": str(seed),
        },
    )
    if find_spec("onnxruntime") is None:
        click.echo("onnxruntime is not installed: the ONNX outputs were not compared with torch's", err=True)
    else:
        error = check_against_torch(proto, split.test_images, logits)
        click.echo(f"onnxruntime agrees with torch to {error:.1f} eps of the largest logit")
    output.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, output)
    click.echo(f"wrote {output} ({output.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
