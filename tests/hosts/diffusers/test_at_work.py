"""Pipelines that are compiled, offloaded, shared or in another thread, fused as they are without that."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import klora
from klora.errors import KloraError, MismatchError
from klora.hosts.diffusers import DiffusersHost
from tests.support.lora_files import write_lora
from tests.support.pipelines import flux_pipeline, run, sd_pipeline

Prepare = Callable[[Any], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """Makes the same small pipeline again and again."""
    return maker(sd_pipeline(tmp_path_factory.mktemp("sd"), levels=2))


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """The same of one that is soon compiled or moved, with attention in its middle alone."""
    return maker(sd_pipeline(tmp_path_factory.mktemp("sd"), levels=1))


def maker(first: Any) -> Callable[[], Any]:
    return lambda: type(first)(
        **{**first.components, "unet": copy.deepcopy(first.unet), "scheduler": copy.deepcopy(first.scheduler)},
        requires_safety_checker=False,
    )


@pytest.fixture(autouse=True)
def quiet(made: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def files_of(folder: Path, pipe: Any, family: str = "lora") -> tuple[Path, Path]:
    model = getattr(pipe, "unet", None) or pipe.transformer
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "attn" in name
    }
    first, second = (
        write_lora(folder / f"{family}-{i}.safetensors", shapes, "peft", family=family, rank=4, seed=i, strength=0.3)
        for i in (1, 2)
    )
    return first, second


def picture(pipe: Any) -> torch.Tensor:
    return run(pipe, num_inference_steps=3)


def storage(model: nn.Module) -> dict[str, tuple[int, torch.Tensor]]:
    return {name: (value.data_ptr(), value.detach().clone()) for name, value in model.named_parameters()}


def assert_close(one: torch.Tensor, two: torch.Tensor) -> None:
    assert (one - two).abs().max() <= 1e-4 * two.abs().max()


def whole(pipe: Any) -> None:
    pipe.unet.compile(backend="eager")


def middle(pipe: Any) -> None:
    pipe.unet.mid_block = torch.compile(pipe.unet.mid_block, backend="eager")


# All ways and orders are tested on a model that compiles at once (tests/engine/test_layers.py).
@pytest.mark.parametrize(
    ("compiled", "order", "engine"),
    [(whole, "before", "bypass"), (middle, "before", "auto"), (middle, "inside", "auto")],
)
def test_a_compiled_unet_gives_the_eager_picture_and_the_plain_one_afterwards(
    smaller: Callable[[], Any], tmp_path: Path, compiled: Prepare, order: str, engine: str
) -> None:
    eager, pipe = smaller(), smaller()
    files, plain, before = files_of(tmp_path, eager), picture(eager), storage(pipe.unet)
    unet = pipe.unet
    with klora.fuse(eager, *files):
        expected = picture(eager)
    if order == "before":
        compiled(pipe)
        assert_close(picture(pipe), plain)
    with klora.fuse(pipe, *files, engine=engine):
        if order == "inside":
            compiled(pipe)
        assert_close(picture(pipe), expected)
    assert_close(picture(pipe), plain)
    for name, value in unet.named_parameters():
        name = name.replace("_orig_mod.", "")
        assert value.data_ptr() == before[name][0]
        assert torch.equal(value, before[name][1])


def test_a_denoiser_that_torch_has_wrapped_has_its_own_names_and_is_what_is_called(made: Callable[[], Any]) -> None:
    pipe = made()
    unet, sites = pipe.unet, DiffusersHost(pipe).sites()
    pipe.unet = torch.compile(unet, backend="eager")
    host = DiffusersHost(pipe)
    assert host.diffusion_model is unet
    assert host.running is pipe.unet
    assert {name: site.module for name, site in host.sites().items()} == {n: s.module for n, s in sites.items()}
    assert "timestep" in host.inputs
    assert host.architecture == DiffusersHost(made()).architecture


@pytest.mark.parametrize("order", ["before", "inside"])
def test_repeated_blocks_compiled_without_a_break_take_a_fusion(tmp_path: Path, order: str) -> None:
    pipe = flux_pipeline(tmp_path)
    files, plain = files_of(tmp_path, pipe), picture(pipe)
    with klora.fuse(pipe, *files):
        expected = picture(pipe)
    if order == "before":
        pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
        assert_close(picture(pipe), plain)
    with klora.fuse(pipe, *files):
        if order == "inside":
            pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
        assert_close(picture(pipe), expected)
    assert_close(picture(pipe), plain)


def cpu_offload(pipe: Any) -> None:
    import accelerate

    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))


def leaf_offload(pipe: Any) -> None:
    grouped(pipe, offload_type="leaf_level")


def block_offload(pipe: Any) -> None:
    grouped(pipe, offload_type="block_level", num_blocks_per_group=1)


def grouped(pipe: Any, **options: Any) -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    cpu = torch.device("cpu")
    hooks.apply_group_offloading(pipe.unet, onload_device=cpu, offload_device=cpu, **options)


@pytest.mark.parametrize("offload", [cpu_offload, leaf_offload, block_offload], ids=lambda way: way.__name__)
@pytest.mark.parametrize("family", ["lora", "dora", "full"])
def test_an_offloaded_unet_gives_the_picture_of_one_that_is_not(
    smaller: Callable[[], Any], tmp_path: Path, offload: Prepare, family: str
) -> None:
    plain_pipe, pipe = smaller(), smaller()
    files, plain = files_of(tmp_path, plain_pipe, family), picture(plain_pipe)
    with klora.fuse(plain_pipe, *files):
        expected = picture(plain_pipe)
    offload(pipe)
    with klora.fuse(pipe, *files, engine="held"):
        assert_close(picture(pipe), expected)
    assert_close(picture(pipe), plain)


def test_a_dora_on_weights_that_are_on_a_disk_is_refused_before_anything_is_touched(
    made: Callable[[], Any], tmp_path: Path
) -> None:
    pipe = made()
    files = files_of(tmp_path, pipe, "dora")
    grouped(pipe, offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "disk"))
    with pytest.raises(MismatchError, match=r"dora-1\.saf.*attn.*: a DoRA needs the weights"), klora.fuse(pipe, *files):
        pass


def test_a_model_exchanged_in_the_block_is_an_error(made: Callable[[], Any], tmp_path: Path) -> None:
    pipe = made()
    attention = [module for module in pipe.unet.modules() if hasattr(module, "to_q")]

    def exchanged() -> None:
        with klora.fuse(pipe, *files_of(tmp_path, pipe)):
            for module in attention:
                for name in ("to_q", "to_k", "to_v"):
                    setattr(module, name, another(getattr(module, name)))
                module.to_out[0] = another(module.to_out[0])
            picture(pipe)

    count = 4 * len(attention)
    with pytest.raises(KloraError, match=rf"{count} of the LoRAs' {count} modules, .* were exchanged"):
        exchanged()


def another(module: nn.Linear) -> nn.Linear:
    return nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)


def test_threads_that_fuse_one_pair_in_pipelines_of_their_own_make_the_pictures_of_one_alone(
    made: Callable[[], Any], tmp_path: Path
) -> None:
    pipes = [made(), made()]
    files = files_of(tmp_path, pipes[0])
    ways: list[dict[str, Any]] = [{"policy": "ties", "density": 0.1}, {"policy": "ties", "density": 0.9}]
    expected, found = [], {}
    for pipe, settings in zip(pipes, ways, strict=True):
        with klora.fuse(pipe, *files, **settings):
            expected.append(picture(pipe))
    klora.release_memory()

    def work(index: int) -> None:
        with klora.fuse(pipes[index], *files, **ways[index]):
            found[index] = picture(pipes[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], expected[index]) for index in (0, 1))


def test_features_of_an_adapter_reach_every_forward_of_composite(made: Callable[[], Any], tmp_path: Path) -> None:
    pipe = made()
    files, unet = files_of(tmp_path, pipe), pipe.unet
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 16, 32)
    sizes = ((16, 8), (8, 16), (4, 16), (2, 16))

    @torch.no_grad()
    def predicted(**settings: Any) -> torch.Tensor:
        features = [torch.full((1, channels, side, side), 3.0) for side, channels in sizes]
        pipe.scheduler.set_timesteps(4)
        with klora.fuse(pipe, *files, **settings):
            return unet(x, pipe.scheduler.timesteps[0], text, down_intrablock_additional_residuals=features).sample

    alone = [predicted(policy="direct", **{f"{side}_strength": 0}) for side in ("style", "subject")]
    torch.testing.assert_close(predicted(policy="composite"), sum(alone) / 2)
