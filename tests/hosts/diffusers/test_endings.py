"""Each way of applying, on a model in each state, with each ending: the plain picture and every parameter after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import klora
from tests.engine.test_held import Packed
from tests.support.lora_files import write_lora
from tests.support.models import module_shapes

CPU = torch.device("cpu")


class Pipe:
    """The least that is a pipeline: a UNet, a scheduler, and a loop."""

    def __init__(self) -> None:
        import diffusers

        torch.manual_seed(0)
        self.unet = diffusers.UNet2DConditionModel(
            sample_size=4,
            cross_attention_dim=8,
            attention_head_dim=2,
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("UpBlock2D",),
        ).eval()
        self.scheduler = diffusers.DDIMScheduler(clip_sample=False)
        self.after_a_step: Callable[[int], None] = lambda step: None

    @torch.no_grad()
    def __call__(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        x, prompt = torch.randn(1, 4, 4, 4, generator=generator), torch.randn(1, 3, 8, generator=generator)
        self.scheduler.set_timesteps(1)
        for step, timestep in enumerate(self.scheduler.timesteps):
            predicted = self.unet(x, timestep, prompt).sample
            x = self.scheduler.step(predicted, timestep, x).prev_sample
            self.after_a_step(step)
        return x


def plain(unet: Any) -> None:
    """As it comes."""


def compiled(unet: Any) -> None:
    unet.mid_block.compile(backend="eager")


def offloaded(unet: Any) -> None:
    import accelerate

    accelerate.cpu_offload_with_hook(unet, CPU)


def offloaded_in_sequence(unet: Any) -> None:
    import accelerate

    accelerate.cpu_offload(unet, CPU)


def offloaded_by_leaf(unet: Any) -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    hooks.apply_group_offloading(unet, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def cast(unet: Any) -> None:
    if not hasattr(unet, "enable_layerwise_casting"):
        pytest.skip("this diffusers does not cast layer by layer")
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def quantised(unet: Any) -> None:
    for module in unet.modules():
        if isinstance(module, nn.Linear):
            module.weight = Packed(module.weight.data)


def with_a_lora(unet: Any) -> None:
    peft = pytest.importorskip("peft")
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


STATES = (plain, offloaded, offloaded_in_sequence, offloaded_by_leaf, cast, quantised, with_a_lora)


MOVING = (offloaded_in_sequence, cast)
"""Those in which parameters are others, or lie elsewhere, after each call."""


class Ended(Exception):  # noqa: N818 (it is no fault)
    """Ends a block."""


Block = Callable[[], Any]


def done(pipe: Pipe, block: Block, patch: pytest.MonkeyPatch) -> None:
    with block():
        pipe()


def stopped_between_steps(pipe: Pipe, block: Block, patch: pytest.MonkeyPatch) -> None:
    ends(pipe, block, KeyboardInterrupt, lambda error: patch.setattr(pipe, "after_a_step", raising(error)))


def failed_in_a_call(pipe: Pipe, block: Block, patch: pytest.MonkeyPatch) -> None:
    in_a_call(pipe, block, Ended)


def interrupted_in_a_call(pipe: Pipe, block: Block, patch: pytest.MonkeyPatch) -> None:
    in_a_call(pipe, block, KeyboardInterrupt)


def out_of_memory(pipe: Pipe, block: Block, patch: pytest.MonkeyPatch) -> None:
    in_a_call(pipe, block, torch.cuda.OutOfMemoryError)


def failed_while_attaching(pipe: Pipe, block: Block, patch: pytest.MonkeyPatch) -> None:
    register, calls = nn.Module.register_forward_hook, []

    def registered(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(register(module, *args, **kwargs))
        if len(calls) == 2:
            raise Ended
        return calls[-1]

    patch.setattr(nn.Module, "register_forward_hook", registered)
    with pytest.raises(Ended), block():
        pass


def left_in_another_order(pipe: Pipe, block: Block, patch: pytest.MonkeyPatch) -> None:
    first, second = ExitStack(), ExitStack()
    first.enter_context(block())
    second.enter_context(block())
    pipe()
    first.close()
    pipe()
    second.close()


def in_a_call(pipe: Pipe, block: Block, kind: type[BaseException]) -> None:
    hooks = []
    try:
        ends(
            pipe, block, kind, lambda error: hooks.append(pipe.unet.mid_block.register_forward_pre_hook(raising(error)))
        )
    finally:
        for hook in hooks:
            hook.remove()


def ends(pipe: Pipe, block: Block, kind: type[BaseException], prepare: Callable[[type[BaseException]], object]) -> None:
    def fused() -> None:
        with block():
            pipe()
            prepare(kind)
            pipe()

    with pytest.raises(kind):
        fused()


def raising(error: type[BaseException]) -> Callable[..., None]:
    def act(*args: Any) -> None:
        raise error

    return act


ENDINGS = (
    done,
    stopped_between_steps,
    failed_in_a_call,
    interrupted_in_a_call,
    out_of_memory,
    failed_while_attaching,
    left_in_another_order,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Low-rank factors, which `auto` applies as products, and whole differences, which it holds."""
    folder = tmp_path_factory.mktemp("files")
    shapes = {name: shape for name, shape in module_shapes(Pipe().unet).items() if ".attn" in name}

    def pair(family: str) -> tuple[Path, Path]:
        first, second = (
            write_lora(folder / f"{family}{i}.safetensors", shapes, "peft", family=family, rank=2, seed=i, strength=0.3)
            for i in (1, 2)
        )
        return first, second

    return {family: pair(family) for family in ("lora", "full")}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def look(model: nn.Module, placed: bool) -> dict[str, tuple[Any, ...]]:
    """What a model has: of each parameter object, place and bytes, of each module its hooks and what is its own."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, one in model.named_parameters():
        place = (id(one), one.data_ptr()) if placed else ()
        found[name] = (*place, b"" if one.is_meta else bytes(one.detach().view(torch.uint8).numpy()))
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._state_dict_hooks)
        found[f"{name} (module)"] = (sorted(vars(module)), *(list(each.values()) for each in hooks))
    return found


@pytest.mark.parametrize(
    ("engine", "ending"),
    # What is chosen module by module is one of the two.
    [*product(["bypass", "held"], ENDINGS), ("auto", done), ("auto", failed_in_a_call)],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_after_every_ending_the_model_is_what_it_was(
    files: dict[str, tuple[Path, Path]],
    state: Callable[[Any], None],
    engine: str,
    ending: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert_is_what_it_was(files["full" if engine == "auto" else "lora"], state, engine, ending, monkeypatch)


@pytest.mark.parametrize(
    ("engine", "ending"), [("bypass", done), ("held", failed_in_a_call), ("held", left_in_another_order)]
)
def test_a_compiled_model_too(
    files: dict[str, tuple[Path, Path]], engine: str, ending: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_is_what_it_was(files["lora"], compiled, engine, ending, monkeypatch)


def assert_is_what_it_was(
    files: tuple[Path, Path],
    state: Callable[[Any], None],
    engine: str,
    ending: Callable[..., None],
    patch: pytest.MonkeyPatch,
) -> None:
    pipe = Pipe()
    state(pipe.unet)
    placed = state not in MOVING
    expected, before = pipe(), look(pipe.unet, placed)
    with patch.context() as patched:
        ending(pipe, lambda: klora.fuse(pipe, *files, engine=engine, policy="direct"), patched)
    assert torch.equal(pipe(), expected)
    assert look(pipe.unet, placed) == before
