"""What is done to a pipeline while it is fused: the picture is the right one, or an error says why not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import klora
from klora.errors import KloraError
from klora.lora.file import LoraFile
from klora.lora.names import kind_of
from tests.engine.test_held import Packed
from tests.support.lora_files import write_lora
from tests.support.models import module_shapes
from tests.support.pipelines import run, sd_pipeline

ENGINES = pytest.mark.parametrize("engine", ["bypass", "held"])
BOTH = {"policy": "direct"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """Makes the same small pipeline again and again."""
    first = sd_pipeline(tmp_path_factory.mktemp("sd"), levels=2)

    def another() -> Any:
        parts = {name: copy.deepcopy(part) for name, part in first.components.items()}
        pipe = type(first)(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return another


@pytest.fixture(scope="module")
def files(made: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, shapes = tmp_path_factory.mktemp("files"), module_shapes(made().unet)
    attention = {name: shape for name, shape in shapes.items() if kind_of(name) == "attention"}
    first, second, _ = (
        write_lora(folder / f"{i}.safetensors", attention, "peft", rank=4, seed=i, strength=0.3) for i in (1, 2, 3)
    )
    return first, second


@pytest.fixture
def third(files: tuple[Path, Path]) -> Path:
    """A LoRA that others load."""
    return files[0].with_name("3.safetensors")


def picture(pipe: Any) -> Tensor:
    return run(pipe, num_inference_steps=2)


def merge(model: nn.Module, *paths: Path) -> nn.Module:
    """Write files into the weights of a model."""
    for path in paths:
        for name, delta in LoraFile.open(path).modules.items():
            weight = model.get_submodule(name).weight
            weight.data += delta.matrix().reshape(weight.shape)
    return model


def doras(folder: Path, like: Path) -> tuple[Path, Path]:
    """Two DoRAs for the modules of a file."""
    shapes = {name: delta.shape for name, delta in LoraFile.open(like).modules.items()}
    first, second = (write_lora(folder / f"{i}.safetensors", shapes, family="dora", seed=i) for i in (1, 2))
    return first, second


def storage(model: nn.Module) -> dict[str, tuple[nn.Parameter, int, Tensor]]:
    return {name: (one, one.data_ptr(), one.detach().clone()) for name, one in model.named_parameters()}


def assert_near(one: Tensor, two: Tensor) -> None:
    assert (one - two).abs().max() <= 1e-4 * two.abs().max()


def assert_bare(model: nn.Module) -> None:
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._state_dict_hooks


@ENGINES
@pytest.mark.parametrize("when", ["at once", "after a picture"])
def test_projections_fused_meanwhile_are_an_error_and_are_made_of_the_models_own_weights(
    made: Callable[[], Any], files: tuple[Path, Path], engine: str, when: str
) -> None:
    pipe = made()
    plain = picture(pipe)

    def fused() -> None:
        with klora.fuse(pipe, *files, **BOTH, engine=engine):
            if when == "after a picture":
                picture(pipe)
            pipe.unet.fuse_qkv_projections()
            picture(pipe)

    with pytest.raises(
        KloraError, match=r"20 of the LoRAs' 32 modules, .*attn1\.to_q.* exchanged after the fusion began"
    ):
        fused()
    assert_near(picture(pipe), plain)
    assert_bare(pipe.unet)


def compiled(unet: Any) -> None:
    unet.compile(backend="eager")


def compiled_blocks(unet: Any) -> None:
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        block.compile(backend="eager")


@ENGINES
@pytest.mark.parametrize("prepare", [lambda unet: None, compiled, compiled_blocks], ids=["eager", "whole", "blocks"])
@pytest.mark.parametrize("when", ["at once", "after a picture"])
def test_projections_parted_meanwhile_are_an_error(
    made: Callable[[], Any], files: tuple[Path, Path], prepare: Callable[[Any], None], engine: str, when: str
) -> None:
    pipe = made()
    plain = picture(pipe)
    pipe.unet.fuse_qkv_projections()
    prepare(pipe.unet)

    def parted() -> None:
        with klora.fuse(pipe, *files, **BOTH, engine=engine):
            if when == "after a picture":
                picture(pipe)
            pipe.unet.unfuse_qkv_projections()
            picture(pipe)

    with pytest.raises(KloraError, match="exchanged after the fusion began"):
        parted()
    assert_near(picture(pipe), plain)
    merge((merged := made()).unet, *files)
    with klora.fuse(pipe, *files, **BOTH, engine=engine):
        assert_near(picture(pipe), picture(merged))


@ENGINES
def test_a_lora_of_others_may_be_loaded_set_fused_and_unloaded_meanwhile(
    made: Callable[[], Any], files: tuple[Path, Path], third: Path, engine: str
) -> None:
    pytest.importorskip("peft")
    pipe, other, both, alone = made(), made(), made(), made()
    merge(other.unet, third)
    merge(both.unet, *files)
    merge(alone.unet, *files, third)
    plain, ours, theirs, all_three = (picture(one) for one in (pipe, both, other, alone))
    before = storage(pipe.unet)
    with klora.fuse(pipe, *files, **BOTH, engine=engine):
        assert_near(picture(pipe), ours)
        pipe.load_lora_weights(str(third), adapter_name="third")
        assert_near(picture(pipe), all_three)
        pipe.set_adapters(["third"], [0.0])
        assert_near(picture(pipe), ours)
        pipe.set_adapters(["third"], [1.0])
        pipe.fuse_lora()
        assert_near(picture(pipe), all_three)
        pipe.unfuse_lora()
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        assert_near(picture(pipe), all_three)
    assert_near(picture(pipe), theirs)
    assert not torch.equal(plain, theirs)
    for name, one in pipe.unet.named_parameters():
        assert one is before[name][0]
    assert_bare(pipe.unet)


@ENGINES
@pytest.mark.parametrize("family", ["lora", "dora"])
def test_values_written_past_torch_meanwhile_are_the_models_own_at_the_next_picture(
    made: Callable[[], Any], files: tuple[Path, Path], third: Path, tmp_path: Path, engine: str, family: str
) -> None:
    pipe, other = made(), made()
    merge(other.unet, third)
    files = files if family == "lora" else doras(tmp_path, files[0])
    with klora.fuse(other, *files, **BOTH, engine=engine):
        expected = picture(other)
    with klora.fuse(pipe, *files, **BOTH, engine=engine):
        picture(pipe)
        merge(pipe.unet, third)
        assert_near(picture(pipe), expected)
    assert all(torch.equal(one, two) for one, two in zip(pipe.unet.parameters(), other.unet.parameters(), strict=True))


@ENGINES
def test_a_denoiser_exchanged_after_a_picture_is_an_error(
    made: Callable[[], Any], files: tuple[Path, Path], engine: str
) -> None:
    pipe = made()
    unet = pipe.unet

    def exchanged() -> None:
        with klora.fuse(pipe, *files, engine=engine):
            picture(pipe)
            pipe.unet = copy.deepcopy(made().unet)
            picture(pipe)

    with pytest.raises(KloraError, match="unet was exchanged after the fusion began; begin it anew"):
        exchanged()
    assert_bare(unet)
    assert_bare(pipe.unet)
    assert "progress_bar" not in vars(pipe)


def leaf_offload(pipe: Any) -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    cpu = torch.device("cpu")
    hooks.apply_group_offloading(pipe.unet, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def cpu_offload(pipe: Any) -> None:
    import accelerate

    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))


def doubled(pipe: Any) -> None:
    pipe.to(torch.float64)
    pipe.to(torch.float32)


def loaded(pipe: Any) -> None:
    pipe.unet.load_state_dict({name: value.clone() for name, value in pipe.unet.state_dict().items()})


def assigned(pipe: Any) -> None:
    state = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    pipe.unet.load_state_dict(state, assign=True)


def packed(pipe: Any) -> None:
    for module in pipe.unet.modules():
        if isinstance(module, nn.Linear):
            module.weight = Packed(module.weight.data)


@ENGINES
@pytest.mark.parametrize(
    "act", [packed, leaf_offload, cpu_offload, doubled, loaded, assigned], ids=lambda act: act.__name__
)
@pytest.mark.parametrize("family", ["lora", "dora"])
def test_weights_that_are_moved_cast_or_loaded_meanwhile_are_the_models_own(
    made: Callable[[], Any],
    files: tuple[Path, Path],
    tmp_path: Path,
    act: Callable[[Any], None],
    engine: str,
    family: str,
) -> None:
    pipe = made()
    plain = picture(pipe)
    files = files if family == "lora" else doras(tmp_path, files[0])
    with klora.fuse(pipe, *files, **BOTH, engine=engine):
        fused = picture(pipe)
        act(pipe)
        assert_near(picture(pipe), fused)
    assert_near(picture(pipe), plain)


@ENGINES
def test_a_pipeline_cast_for_good_meanwhile_stays_so(
    made: Callable[[], Any], files: tuple[Path, Path], engine: str
) -> None:
    pipe, before = made(), made().to(torch.bfloat16)
    plain = picture(before)
    with klora.fuse(before, *files, **BOTH, engine=engine):
        expected = picture(before)
    with klora.fuse(pipe, *files, **BOTH, engine=engine):
        picture(pipe)
        pipe.to(torch.bfloat16)
        assert torch.equal(picture(pipe), expected)
    assert {one.dtype for one in pipe.unet.parameters()} == {torch.bfloat16}
    assert torch.equal(picture(pipe), plain)


@ENGINES
def test_layers_cast_meanwhile_store_the_models_own_weights(
    made: Callable[[], Any], files: tuple[Path, Path], engine: str
) -> None:
    pipe, cast = made(), made()
    if not hasattr(pipe.unet, "enable_layerwise_casting"):
        pytest.skip("this diffusers does not cast layer by layer")
    options = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    cast.unet.enable_layerwise_casting(**options)
    with klora.fuse(cast, *files, **BOTH):
        expected = picture(cast)
    with klora.fuse(pipe, *files, **BOTH, engine=engine):
        picture(pipe)
        pipe.unet.enable_layerwise_casting(**options)
        assert_near(picture(pipe), expected)
    assert_near(picture(pipe), picture(cast))
