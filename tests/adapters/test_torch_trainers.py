"""Tests of the callbacks of Lightning and of the Hugging Face Trainer, on models that others wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from convsv_adapters.torch import analyze, conv_layers, operator_norm, project_after_step
from torch import nn

import convsv_core as convsv

SLACK = 1 + 1e-6
SIZE = 16


def resnet() -> nn.Module:
    """Return an untrained residual network of the transformers library, with norms above 1."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
        )
    )
    with torch.no_grad():
        for layer in conv_layers(model):
            layer.weight.mul_(3)
    return model


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, SIZE, SIZE, generator=generator), "labels": torch.tensor(index % 3)}
        for index in range(count)
    ]


def norms(model: nn.Module) -> dict[str, float]:
    return {
        layer.name: float(convsv.norm_bounds(layer.weight.detach(), layer.conv).upper) for layer in conv_layers(model)
    }


# ---- somebody else's models --------------------------------------------------------------------------------


def test_a_residual_network_of_others() -> None:
    model = resnet()
    example = {"pixel_values": torch.zeros(1, 3, SIZE, SIZE)}
    layers = conv_layers(model, example)
    assert len(layers) == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert layers[0].input_shape == (SIZE, SIZE)
    assert all(layer.input_shape is not None and not layer.note for layer in layers)
    reports = analyze(model, example)
    assert [report.name for report in reports] == [layer.name for layer in layers]
    assert all(report.operator_norm for report in reports)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    projection = project_after_step(optimizer, model, 1.0, method="rescale")
    batch = torch.utils.data.default_collate(batches(4))
    assert max(norms(model).values()) > 1
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert max(norms(model).values()) <= SLACK
    assert set(projection.norms) == {layer.name for layer in layers}


def test_the_parametrization_in_a_network_of_others() -> None:
    model = resnet()
    for module in [module for module in model.modules() if isinstance(module, nn.Conv2d)]:
        operator_norm(module, bound=0.5)
    batch = torch.utils.data.default_collate(batches(4))
    model(**batch).loss.backward()
    found = norms(model)
    assert max(found.values()) <= 0.5 * (1 + 1e-3)
    model.eval()
    model(**batch)
    assert norms(model) == found
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_weight_normed_grouped_convolutions_of_others() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
    )
    model = transformers.Wav2Vec2Model(config)
    layers = conv_layers(model, torch.randn(1, 400))
    assert [layer.conv.ndim for layer in layers] == [1, 1, 1]
    (positional,) = [layer for layer in layers if layer.conv.groups == 4]
    assert positional.input_shape == (39,)
    with torch.no_grad():
        positional.module.weight = 50 * positional.weight
    projection = project_after_step(
        torch.optim.SGD(model.parameters(), lr=0.0), model, 0.5, method="rescale", layers=[positional]
    )
    projection.project()
    rounding = 8 * torch.finfo(torch.float32).eps  # of the parametrization, which stores direction and length
    assert norms(model)[positional.name] <= 0.5 * SLACK * (1 + rounding)


# ---- Lightning -----------------------------------------------------------------------------------------------


def lightning_module(pl: Any) -> Any:
    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = resnet()

        def forward(self, pixel_values: torch.Tensor) -> Any:
            return self.model(pixel_values)

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Classifier()


def lightning_trainer(pl: Any, folder: Path, callbacks: list[Any], **options: Any) -> Any:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
        **options,
    )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore:.*:Warning:pytorch_lightning")
@pytest.mark.parametrize(
    ("accumulate", "every", "steps", "log"),
    [pytest.param(1, 1, 4, True, marks=pytest.mark.thorough), (2, 1, 2, False), (1, 3, 4, True)],
)
def test_lightning_projects_after_optimizer_steps(
    tmp_path: Path, accumulate: int, every: int, steps: int, log: bool
) -> None:
    pl = pytest.importorskip("pytorch_lightning")
    from convsv_adapters.lightning import OperatorNormProjection

    callback = OperatorNormProjection(1.0, every, method="rescale", log=log)
    module = lightning_module(pl)
    data = torch.utils.data.DataLoader(batches(8), batch_size=2)
    trainer = lightning_trainer(pl, tmp_path, [callback], accumulate_grad_batches=accumulate)
    trainer.fit(module, data)
    assert callback.projection is not None
    assert callback.projection.steps == trainer.global_step == steps
    assert max(norms(module).values()) <= SLACK
    logged = {name for name in trainer.callback_metrics if name.startswith("operator_norm/")}
    assert logged == ({f"operator_norm/{name}" for name in norms(module)} if log else set())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore:.*:Warning:pytorch_lightning")
def test_lightning_measures_and_changes_nothing(tmp_path: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning")
    from convsv_adapters.lightning import SpectrumMonitor

    weights = []
    for callbacks in [], [SpectrumMonitor({"pixel_values": torch.zeros(1, 3, SIZE, SIZE)}, 2)]:
        torch.manual_seed(0)
        module = lightning_module(pl)
        trainer = lightning_trainer(pl, tmp_path, callbacks)
        trainer.fit(module, torch.utils.data.DataLoader(batches(10), batch_size=2))
        weights.append(module.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    monitor = callbacks[0].monitor
    assert monitor is not None
    assert [one.step for one in monitor.measurements] == [2, 4, 5]
    measured = {one.name: one.certified_norm for one in monitor.measurements[-1].layers}
    for name, norm in norms(module).items():
        assert norm <= measured[name] * SLACK <= 1.011 * norm
    logged = {name for name in trainer.callback_metrics if name.startswith("stable_rank/")}
    assert logged == {f"stable_rank/{name}" for name in measured}


# ---- the Hugging Face Trainer ----------------------------------------------------------------------------------


def hugging_face_trainer(folder: Path, callback: Any) -> Any:
    """Return a trainer of three steps of four images each."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return transformers.Trainer(model=resnet(), args=arguments, train_dataset=batches(12), callbacks=[callback])


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_the_hugging_face_trainer_projects_and_logs(tmp_path: Path, every: int) -> None:
    from convsv_adapters.transformers import OperatorNormProjection

    callback = OperatorNormProjection(1.0, every, method="rescale")
    trainer = hugging_face_trainer(tmp_path, callback)
    model = trainer.model
    trainer.train()
    assert callback.projection is not None
    assert callback.projection.steps == 3
    assert max(norms(model).values()) <= SLACK
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = [{name for name in entry if name.startswith("operator_norm/")} for entry in entries]
    wanted = {f"operator_norm/{name}" for name in norms(model)}
    assert found == [wanted if index + 1 >= every else set() for index in range(3)]


def test_the_hugging_face_trainer_measures(tmp_path: Path) -> None:
    from convsv_adapters.transformers import SpectrumMonitor

    callback = SpectrumMonitor({"pixel_values": torch.zeros(1, 3, SIZE, SIZE)}, 2, tmp_path / "spectra.csv")
    trainer = hugging_face_trainer(tmp_path, callback)
    trainer.train()
    assert callback.monitor is not None
    assert [one.step for one in callback.monitor.measurements] == [2, 3]
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = [{name for name in entry if name.startswith("certified_norm/")} for entry in entries]
    assert found == [set(), *[{f"certified_norm/{name}" for name in norms(trainer.model)}] * 2]
    assert (tmp_path / "spectra.csv").read_text().startswith("step,layer,certified_norm,")
