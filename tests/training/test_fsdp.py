"""What FSDP2 is asked to do, and what it is not; that it does it is seen in test_distributed.py, on two processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from toys.models import TOYS, UNRECORDED, answer_model, part, random_model

from lightning_ssiuu.models.answers import AnswerModel
from lightning_ssiuu.models.architectures import ARCHITECTURES, Architecture, transformer_blocks
from lightning_ssiuu.training.fsdp import data_parallel, load_sharded, shard, use_all_devices
from lightning_ssiuu.utils.errors import UserError


def on_devices(n: int, **kwargs: Any) -> ModelParallelStrategy:
    strategy = ModelParallelStrategy(**kwargs)
    strategy.parallel_devices = [torch.device("cpu")] * n
    return strategy


@pytest.mark.parametrize("given", [{}, {"tensor_parallel_size": 1}, {"data_parallel_size": 4}])
def test_all_devices_share_the_weights_unless_told_otherwise(given: dict[str, int]) -> None:
    strategy = on_devices(2, **given)
    strategy.num_nodes = 2
    use_all_devices(strategy)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (4, 1)
    use_all_devices(DDPStrategy())


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"tensor_parallel_size": 2}, "trainer.strategy.tensor_parallel_size: got 2"),
        ({"data_parallel_size": 1}, 'trainer.strategy.data_parallel_size: got 1, allowed: "auto" or 2'),
        ({"data_parallel_size": 1, "tensor_parallel_size": 2}, "trainer.strategy.tensor_parallel_size: got 2"),
    ],
)
def test_devices_with_the_same_weights_are_refused(given: dict[str, int], named: str) -> None:
    with pytest.raises(UserError, match=named):
        use_all_devices(on_devices(2, **given))


class Mesh:
    """As much of a device mesh as is asked for: the same size in each dimension."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __getitem__(self, dimension: str) -> Mesh:
        return self

    def size(self) -> int:
        return self._size


def test_a_tensor_parallel_mesh_is_refused() -> None:
    # what ModelParallelStrategy() makes of one node with two devices, where no command line has a say
    with pytest.raises(UserError, match="tensor_parallel_size: got 2, allowed: 1, and data_parallel_size"):
        data_parallel(Mesh(2))


@pytest.mark.parametrize("name", TOYS)
def test_blocks_hold_everything_that_is_repeated(name: str) -> None:
    model = random_model(name, torch.float32)
    blocks = transformer_blocks(model)
    assert len(blocks) == 2
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = [n for n, p in model.named_parameters() if id(p) not in inside]
    assert inside
    assert not [n for n in outside if ".0." in n or ".1." in n]


def test_unknown_blocks_are_refused() -> None:
    model = random_model(UNRECORDED, torch.float32)
    model._no_split_modules = None
    with pytest.raises(UserError, match="checkpoint: got 'granite', allowed: an architecture whose blocks are known"):
        transformer_blocks(model)


def test_quantised_weights_are_refused_before_anything_is_loaded() -> None:
    one = Mesh(1)
    with pytest.raises(UserError, match=r"quantization: got '8bit', allowed: null under FSDP2.*ddp"):
        load_sharded(lambda **_: pytest.fail("loaded"), one, torch.device("cpu"), "8bit")
    model = answer_model()
    model.hf.is_quantized = True
    model.hf.config.quantization_config = type("Config", (), {"quant_method": "bitsandbytes"})()
    with pytest.raises(UserError, match="quantization: got 'bitsandbytes'"):
        shard(model, one)


def test_trained_weights_of_several_types_are_refused() -> None:
    model = answer_model()
    model.hf.model.layers[0].mlp.up_proj.bfloat16()
    with pytest.raises(UserError, match=r"trainer.precision: got .*torch.bfloat16.*torch.float64"):
        shard(model, Mesh(2))


def test_frozen_weights_may_have_another_type(monkeypatch: pytest.MonkeyPatch) -> None:
    sharded: list[nn.Module] = []
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda module, **_: sharded.append(module))
    monkeypatch.setattr("torch.distributed.fsdp.register_fsdp_forward_method", lambda *_: None)
    model = answer_model()
    model.hf.model.layers[0].mlp.up_proj.bfloat16().requires_grad_(False)
    shard(model, Mesh(2))
    assert sharded == [*model.hf.model.layers, model]


def test_shards_have_the_head_and_the_rows_that_the_whole_model_was_found_to_have(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Architecture("model.layers", "model.norm", {"mlp_up": "mlp.up_proj"}, plain_head=True)
    monkeypatch.setitem(ARCHITECTURES, "gemma2", plain)

    def build(device_map: str = "cpu") -> AnswerModel:
        with torch.device(device_map):
            model = AnswerModel(random_model("gemma2", torch.float32))
        model.packs = device_map == "meta"
        return model

    assert build("meta").plain_head
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        model, whole, some = load_sharded(build, mesh, torch.device("cpu")), build(), part([(3, 2), (2, 4)])
        some.pop("example_id")
        assert not model.plain_head
        assert not model.packs
        torch.testing.assert_close(model(**some).logits, whole(**some).logits)
    finally:
        dist.destroy_process_group()
