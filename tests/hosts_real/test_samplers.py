"""Every sampler family runs, and τ follows its noise."""

from __future__ import annotations

import pytest

from tests.hosts_real.server import ApiError, Server

TAG = "<klora:subj:style>"
FORCED = "<klora:subj:style:alpha=0:beta=0>"
SAMPLERS = (
    "Euler",
    "Euler a",
    "LMS",
    "Heun",
    "DPM2",
    "DPM2 a",
    "DPM++ 2S a",
    "DPM++ 2M",
    "DPM++ SDE",
    "DPM++ 2M SDE",
    "DPM++ 3M SDE",
    "DPM fast",
    "DPM adaptive",
    "DDIM",
    "PLMS",
    "UniPC",
    "LCM",
    "Restart",
    "DDPM",
    "IPNDM",
    "HeunPP2",
    "DEIS",
)
FIRST_ORDER = ("Euler", "Euler a", "LMS", "DPM++ 2M", "DPM++ 2M SDE", "DPM++ 3M SDE", "LCM")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_tau_follows_the_noise(server: Server, sampler: str) -> None:
    known = {one["name"] for one in server.call("/sdapi/v1/samplers")}
    if sampler not in known:
        pytest.skip(f"{server.kind} has no {sampler}")
    steps = server.defaults["steps"]
    levels = server.levels(lambda: server.txt2img(TAG, sampler_name=sampler))
    taus = [tau for _, tau in levels]
    assert taus[0] == 0
    assert all(0 <= tau <= 1 for tau in taus)
    # Less noise is later, always; and one noise, one τ.
    assert all(
        tau <= after
        for (_, tau), (_, after) in zip(sorted(levels, reverse=True), sorted(levels)[::-1][1:], strict=False)
    )
    assert taus[-1] >= 1 - 2 / steps
    if sampler in FIRST_ORDER:
        assert taus == pytest.approx([i / steps for i in range(steps)])
    if sampler == "Heun":
        expected = [0.0, *(i / steps for i in range(1, steps) for _ in range(2))]
        assert taus == pytest.approx(expected)


@pytest.mark.parametrize("sampler", ["Heun", "DPM++ 2M", "DDIM", "UniPC"])
def test_a_forced_winner_is_the_plain_lora(server: Server, sampler: str) -> None:
    forced = server.txt2img(FORCED, sampler_name=sampler)
    assert forced.distance(server.txt2img("<lora:subj:1>", sampler_name=sampler)) <= 1


@pytest.mark.parametrize("scheduler", ["Karras", "Exponential", "Uniform", "SGM Uniform", "Simple", "DDIM"])
def test_schedulers(server: Server, scheduler: str) -> None:
    try:
        known = {one["label"] for one in server.call("/sdapi/v1/schedulers")}
    except ApiError as error:
        if error.status != 404:
            raise
        pytest.skip(f"{server.kind} lists no schedulers")
    if scheduler not in known:
        pytest.skip(f"{server.kind} has no {scheduler}")
    taus = server.taus(lambda: server.txt2img(TAG, scheduler=scheduler))
    # Not every scheduler makes as many steps as it is told to.
    steps = len(taus)
    assert taus == pytest.approx([i / steps for i in range(steps)])
