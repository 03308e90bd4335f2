"""A training step: which images it sees, the gradient it follows, and how it refuses to go on."""

from __future__ import annotations

import dataclasses
import os
import socket
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pycocotools")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from smca_model.data.coco import CocoDetection, collate
from smca_model.data.layouts import find_split
from smca_model.evaluate import evaluate
from smca_model.training import distributed, engine, loop, setup
from smca_model.training.settings import Settings

CPU = torch.device("cpu")
SIZE = 48
TINY = ("hidden_dim=32", "num_heads=2", "decoder_layers=2", "num_queries=10", "ffn_dim=64")


def settings(data: Path, **changes: Any) -> Settings:
    # Without crops no scene is padded, so that what is computed for one doesn't depend on the others of a batch.
    fixed: dict[str, Any] = {"preset": "smca-tiny", "overrides": TINY, "sizes": (SIZE,), "max_size": 2 * SIZE}
    return Settings(data=str(data), workers=0, crop=False, **fixed | changes)


def trainer(chosen: Settings) -> engine.Trainer:
    train_set, _ = setup.open_data(chosen)
    model = setup.build_model(chosen, len(train_set.classes), from_weights=False, device=CPU)
    return engine.Trainer(model, chosen, steps_per_epoch=len(train_set) // chosen.batch_size // chosen.accumulate)


def plain_batch(data: Path, images: slice = slice(None)) -> engine.Batch:
    """Scenes as they are."""
    scenes = CocoDetection(*find_split(data, "train"), train=False, sizes=(SIZE,), max_size=2 * SIZE)
    return collate([scenes[i] for i in range(8)[images]])


def gradients(one: engine.Trainer) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in one.model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Within the rounding of sums over the largest gradient: another order of adding the same numbers."""
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-6 * largest)


# ------------------------------------------------------------------------------------------------------ images in order


def test_an_epoch_has_every_image_once_in_an_order_of_its_own(data: Path) -> None:
    chosen = settings(data, batch_size=2)
    epochs = [engine.batches(8, epoch, 0, chosen, 0, 1) for epoch in range(2)]
    orders = [[image for batch in epoch for image in batch] for epoch in epochs]
    assert [sorted(order) for order in orders] == [list(range(8))] * 2
    assert orders[0] != orders[1]
    assert engine.batches(8, 0, 0, chosen, 0, 1) == epochs[0]


def test_another_seed_has_another_order(data: Path) -> None:
    one, other = (engine.batches(64, 0, 0, settings(data, batch_size=2, seed=seed), 0, 1) for seed in (0, 1))
    assert one != other


def test_an_epoch_goes_on_from_a_step_as_it_would_have(data: Path) -> None:
    chosen = settings(data, batch_size=2, accumulate=2)
    whole = engine.batches(20, 0, 0, chosen, 0, 1)
    assert len(whole) == 10
    assert engine.batches(20, 0, 3, chosen, 0, 1) == whole[6:]


def test_every_epoch_augments_an_image_anew(data: Path) -> None:
    one = trainer(settings(data, batch_size=8, sizes=tuple(range(32, 49))))
    scenes, _ = setup.open_data(one.settings)
    epochs = []
    for one.step in (0, 1, 0):
        ((images, targets),) = next(engine.epoch_batches(scenes, one))
        epochs.append({t["image_id"]: image for t, image in zip(targets, images, strict=True)})
    equal = [[torch.equal(epochs[0][i], other[i]) for i in epochs[0]] for other in epochs[1:]]
    assert not all(equal[0])
    assert all(equal[1])


def test_two_processes_see_what_one_with_twice_the_batch_sees(data: Path) -> None:
    one = engine.batches(23, 0, 0, settings(data, batch_size=4), 0, 1)
    halves = [engine.batches(23, 0, 0, settings(data, batch_size=2), rank, 2) for rank in range(2)]
    assert [first + second for first, second in zip(*halves, strict=True)] == one


def test_of_the_order_each_batch_copies_its_own_images_alone(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []

    class Order(list[int]):
        def __getitem__(self, index: Any) -> Any:
            found = super().__getitem__(index)
            copied.extend(found if isinstance(index, slice) else [found])
            return found

    class Permutation:
        def tolist(self) -> Order:
            return Order(range(100))

    monkeypatch.setattr(torch, "randperm", lambda *_, **__: Permutation())
    engine.batches(100, 0, 0, settings(data, batch_size=2), 0, 1)
    assert copied == list(range(100))


def test_images_that_fill_no_step_are_left_out(data: Path) -> None:
    assert len(engine.batches(11, 0, 0, settings(data, batch_size=2, accumulate=2), 0, 1)) == 4


# --------------------------------------------------------------------------------------------------------------- a step


def test_eight_scenes_are_learnt_by_heart(data: Path) -> None:
    fast = {"lr": 1e-3, "lr_backbone": 1e-3, "warmup_steps": 20, "epochs": 190, "lr_drop": 150}
    wider = ("hidden_dim=64", "decoder_layers=2", "num_queries=10", "ffn_dim=128")
    one = trainer(settings(data, batch_size=8, overrides=wider, **fast))
    batch = plain_batch(data)
    for _ in range(190):
        one.train_step([batch])
    scenes = CocoDetection(*find_split(data, "train"), train=False, sizes=(SIZE,), max_size=2 * SIZE)
    numbers = evaluate(one.model, scenes, batch_size=8, device=CPU, progress=False)
    assert numbers["AP"] > 0.9


def test_accumulated_batches_give_the_gradient_of_one_large_batch(data: Path) -> None:
    whole, parts = (trainer(settings(data, batch_size=b, accumulate=8 // b, clip=1e9)) for b in (8, 4))
    expected = whole.train_step([plain_batch(data)])
    actual = parts.train_step([plain_batch(data, slice(0, 4)), plain_batch(data, slice(4, 8))])
    assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert_same_gradients(gradients(parts), gradients(whole))


def test_a_batch_without_objects_weighs_nothing_more_than_its_background(data: Path) -> None:
    images, targets = plain_batch(data)
    empty = [{**t, "boxes": t["boxes"][:0], "labels": t["labels"][:0]} for t in targets[:4]]
    whole, parts = (trainer(settings(data, batch_size=b, accumulate=8 // b, clip=1e9)) for b in (8, 4))
    whole.train_step([(images, empty + targets[4:])])
    parts.train_step([(images[:4], empty), (images[4:], targets[4:])])
    assert_same_gradients(gradients(parts), gradients(whole))


def _process(rank: int, port: int, data: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    chosen = settings(data, batch_size=2, accumulate=2, clip=1e9, epochs=1, out=str(folder / "run"), log_every=1)
    with distributed.process_group():
        one = trainer(chosen)
        train_set, _ = setup.open_data(chosen)
        one.train_step(next(engine.epoch_batches(train_set, one)))
        torch.save(gradients(one), folder / f"gradients{rank}.pt")
        loop.train(chosen)


def test_two_processes_give_the_gradient_of_one_with_twice_the_batch(data: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (port, data, tmp_path), nprocs=2)
    of_processes = [torch.load(tmp_path / f"gradients{rank}.pt") for rank in range(2)]
    one = trainer(settings(data, batch_size=4, accumulate=2, clip=1e9))
    train_set, _ = setup.open_data(one.settings)
    expected = one.train_step(next(engine.epoch_batches(train_set, one)))
    for each in of_processes:
        assert_same_gradients(each, gradients(one))
    told = loop.read_metrics(tmp_path / "run")
    assert told[0]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert told[0]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert "AP" in told[1]


def _whole_run(rank: int, port: int, data: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    reducing: list[weakref.ref[Any]] = []

    class Parallel(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            reducing.append(weakref.ref(self))

    destroy = torch.distributed.destroy_process_group

    def destroy_process_group() -> None:
        alive = [each for each in reducing if each() is not None]
        (folder / f"alive{rank}").write_text(f"{len(alive)} of {len(reducing)}")
        destroy()

    torch.nn.parallel.DistributedDataParallel = Parallel  # type: ignore[misc]
    torch.distributed.destroy_process_group = destroy_process_group
    loop.train(settings(data, batch_size=2, epochs=1, out=str(folder / "run"), eval_every=1))


def test_what_reduces_gradients_is_gone_before_the_processes_part(data: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_whole_run, (port, data, tmp_path), nprocs=2)
    assert [(tmp_path / f"alive{rank}").read_text() for rank in range(2)] == ["0 of 1"] * 2


def test_the_moving_average_lags_behind_the_weights(data: Path) -> None:
    one = trainer(settings(data, batch_size=8, ema=0.5))
    name = "class_embed.weight"
    weights = [dict(one.model.named_parameters())[name].detach().clone()]
    for _ in range(2):
        one.train_step([plain_batch(data)])
        weights.append(dict(one.model.named_parameters())[name].detach().clone())
    # The first update takes the weights as they are.
    torch.testing.assert_close(dict(one.trained_model.named_parameters())[name], (weights[1] + weights[2]) / 2)


def test_the_moving_average_has_the_buffers_as_they_are(data: Path, tmp_path: Path) -> None:
    chosen = settings(data, batch_size=8, ema=0.9)
    one, other = trainer(chosen), trainer(chosen)
    for each in (one, other):
        each.model.register_buffer("index", torch.arange(0, 1000, 7))  # as window attention has positions
        each.model.register_buffer("variance", torch.rand(3))
        each.ema = engine.Trainer(each.model, chosen, each.steps_per_epoch).ema
    for step in range(3):
        one.train_step([plain_batch(data)])
        if step == 1:
            torch.save(one.state(), tmp_path / "state.pt")
            other.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    other.train_step([plain_batch(data)])
    for each in (one, other):
        buffers = dict(each.trained_model.named_buffers())
        assert all(torch.equal(buffers[name], buffer) for name, buffer in each.model.named_buffers())
        assert torch.equal(buffers["index"], torch.arange(0, 1000, 7))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_too(data: Path, precision: str) -> None:
    one = trainer(settings(data, batch_size=8, precision=precision, lr=1e-3, lr_backbone=1e-3))
    losses = [one.train_step([plain_batch(data)])["loss"] for _ in range(8)]
    assert losses[-1] < losses[0]


def test_the_learning_rate_rises_then_falls_once(data: Path) -> None:
    chosen = settings(data, epochs=3, lr_drop=2, warmup_steps=4)
    factors = [chosen.learning_rate_factor(step, steps_per_epoch=5) for step in range(15)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 7, *[0.1] * 5])


def test_the_backbone_has_a_learning_rate_of_its_own(data: Path) -> None:
    one = trainer(settings(data, batch_size=8, lr_backbone=0.0, weight_decay=0.0))
    before = {n: p.detach().clone() for n, p in one.model.named_parameters()}
    one.train_step([plain_batch(data)])
    moved = {n.split(".")[0] for n, p in one.model.named_parameters() if not torch.equal(p, before[n])}
    assert "backbone" not in moved
    assert {"input_proj", "encoder", "decoder", "class_embed", "bbox_embed"} <= moved


# ---------------------------------------------------------------------------------------------------------------- guard


def test_outputs_that_are_not_finite_are_told_with_layer_head_and_images(data: Path) -> None:
    one = trainer(settings(data, batch_size=8))
    images, targets = plain_batch(data)
    images[3] = torch.full_like(images[3], torch.nan)
    with pytest.raises(engine.TrainingError, match="class head of decoder layer 1 .* image ids " + r"\[4\]"):
        one.train_step([(images, targets)])


def test_a_box_head_that_is_not_finite_is_told(data: Path) -> None:
    one = trainer(settings(data, batch_size=8))
    torch.nn.init.constant_(one.model.bbox_embed[-1].bias, torch.nan)
    with pytest.raises(
        engine.TrainingError, match=r"box head of decoder layer 1 .* image ids \[1, 2, 3, 4, 5, 6, 7, 8\]"
    ):
        one.train_step([plain_batch(data)])


def test_the_first_decoder_layer_that_is_not_finite_is_told(data: Path) -> None:
    one = trainer(settings(data, batch_size=8))
    torch.nn.init.constant_(one.model.decoder.layers[1].ffn.linear1.bias, torch.inf)
    with pytest.raises(engine.TrainingError, match=r"step 0: the class head of decoder layer 2 .* \[1, 2, .*, 8\]"):
        one.train_step([plain_batch(data)])


@pytest.mark.parametrize(("name", "layer"), [("loss_giou_0", 1), ("loss_giou", 2)])
def test_a_loss_that_is_not_finite_is_told_with_its_layer_and_images(name: str, layer: int) -> None:
    losses = {"loss_ce": 1.0, "loss_ce_0": 1.0, name: float("inf")}
    with pytest.raises(
        engine.TrainingError, match=rf"step 7: the loss giou of decoder layer {layer} is inf; .*\[5, 9\]"
    ):
        engine.check_losses(losses, [{"image_id": 5}, {"image_id": 9}], layers=2, step=7)


def test_a_gradient_that_is_not_finite_is_told_and_changes_no_weight(data: Path) -> None:
    one = trainer(settings(data, batch_size=8))
    one.model.class_embed.bias.register_hook(lambda gradient: gradient * torch.nan)
    before = {n: p.detach().clone() for n, p in one.model.named_parameters()}
    with pytest.raises(engine.TrainingError, match=r"norm of the gradient is nan, from class_embed\.bias; image ids"):
        one.train_step([plain_batch(data)])
    assert all(torch.equal(p, before[n]) for n, p in one.model.named_parameters())


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_state_holds_all_that_the_next_steps_depend_on(data: Path, ema: float, tmp_path: Path) -> None:
    chosen = settings(data, batch_size=4, ema=ema, overrides=(*TINY, "dropout=0.1"), epochs=3, lr_drop=1)
    train_set, _ = setup.open_data(chosen)

    def steps(one: engine.Trainer, count: int) -> None:
        for _ in range(count):
            one.train_step(next(engine.epoch_batches(train_set, one)))

    whole, first, second = (trainer(chosen) for _ in range(3))
    steps(whole, 3)
    steps(first, 1)
    torch.save(first.state(), tmp_path / "state.pt")
    torch.rand(7)
    second.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(second, 2)
    for expected, actual in ((whole.model, second.model), (whole.trained_model, second.trained_model)):
        for (name, one), other in zip(expected.state_dict().items(), actual.state_dict().values(), strict=True):
            assert torch.equal(one, other), name


def test_settings_change_nothing_but_themselves(data: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings(data).lr = 1.0  # type: ignore[misc]
