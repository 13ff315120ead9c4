"""Pictures of a fused pair: one for each seed, with all that made it, and a pipeline that is left as it was."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from klora.engine.session import Session
from klora.errors import KloraError
from klora.generation.generate import GeneratedPicture, generate, session_notices
from klora.generation.request import GenerationRequest
from klora.settings import Settings
from tests.support.lora_files import write_lora
from tests.support.models import module_shapes
from tests.support.pipelines import scheduler, sd_pipeline


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return sd_pipeline(tmp_path_factory.mktemp("tokenizer"), levels=1)


@pytest.fixture
def request_(pipe: Any, tmp_path: Path) -> GenerationRequest:
    attention = {name: shape for name, shape in module_shapes(pipe.unet).items() if ".attn1." in name}
    subject = write_lora(tmp_path / "dog.safetensors", attention, "kohya", rank=4, seed=1)
    style = write_lora(tmp_path / "ink.safetensors", {**attention, "nowhere.attn1.to_q": (8, 8)}, "peft", seed=2)
    settings = Settings(steps=2)
    return GenerationRequest("m", str(subject), str(style), "a dog", tmp_path, settings, size=(32, 32), guidance=1.0)


def pictures(pipe: Any, request: GenerationRequest, seeds: Sequence[int]) -> list[GeneratedPicture]:
    return list(generate(pipe, request, seeds, lambda *_: None))


def hooks(pipe: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in pipe.unet.modules())


def test_each_picture_is_announced_and_is_that_of_its_seed(pipe: Any, request_: GenerationRequest) -> None:
    heard: list[int] = []
    one, two = generate(pipe, request_, [7, 8], lambda number, _: heard.append(number))
    [again] = pictures(pipe, request_, [8])
    assert heard == [1, 2]
    assert (one.facts["seed"], two.facts["seed"]) == (7, 8)
    assert again.image.tobytes() == two.image.tobytes() != one.image.tobytes()


def test_forwards_are_counted_whatever_the_scheduler_asks_for(pipe: Any, request_: GenerationRequest) -> None:
    [first_order] = pictures(pipe, request_, [0])
    usual, pipe.scheduler = pipe.scheduler, scheduler("HeunDiscreteScheduler")
    try:
        [second_order] = pictures(pipe, request_, [0])
    finally:
        pipe.scheduler = usual
    assert (first_order.forwards, second_order.forwards) == (1.0, 1.5)


def test_the_facts_say_what_made_a_picture_and_no_path(pipe: Any, request_: GenerationRequest, tmp_path: Path) -> None:
    [made] = pictures(pipe, request_, [0])
    assert (made.facts["subject"]["file"], made.facts["style"]["file"]) == ("dog.safetensors", "ink.safetensors")
    assert (made.facts["guidance_scale"], made.facts["size"]) == (1.0, [32, 32])
    assert 0 < made.facts["share"] < 1
    assert str(tmp_path) not in str(made.facts)


def test_a_generator_that_is_closed_leaves_the_pipeline_as_it_was(pipe: Any, request_: GenerationRequest) -> None:
    before = hooks(pipe)
    with closing(generate(pipe, request_, [0, 1], lambda *_: None)) as made:
        next(made)
        assert hooks(pipe) > before
    assert hooks(pipe) == before


def test_what_the_model_lacks_is_told(pipe: Any, request_: GenerationRequest) -> None:
    found: list[str] = []

    def announce(_: int, session: Session) -> None:
        found.extend(session_notices(session))

    list(generate(pipe, request_, [0], announce))
    assert any("such as nowhere_attn1_to_q) found no place in the model" in line for line in found)


def test_memory_that_does_not_suffice_is_one_line(
    pipe: Any, request_: GenerationRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(pipe.vae, "decode", full)
    with pytest.raises(KloraError, match="out of memory; try a smaller --size"):
        pictures(pipe, request_, [0])
