"""A WebUI in small, for tests: it calls an extension in the order, and with the faults, of A1111 and the Forge family.

    with installed("a1111", tmp_path) as host:
        picture = host.txt2img("a dog <klora:dog:ink>")

What is told here of the hosts was observed on running ones. Left out is all that no extension of this kind can notice.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support.lora_files import unet_ldm
from tests.support.pairs import TEXT
from tests.webui.fake_model import FORGES, TEXT_LAYER, Checkpoint, merge, restore
from tests.webui.fake_processing import Data, ExtraNetworkParams, Processing, setup_img2img_steps


class Callbacks(types.ModuleType):
    """modules.script_callbacks; what a callback raises is swallowed."""

    def __init__(self) -> None:
        super().__init__("modules.script_callbacks")
        self.known: dict[str, list[Callable[..., None]]] = {}
        self.swallowed: list[Exception] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("on_"):
            raise AttributeError(name)
        return self.known.setdefault(name.removeprefix("on_"), []).append

    def call(self, event: str, *args: Any) -> None:
        """Call all that is registered."""
        for callback in self.known.get(event, []):
            try:
                callback(*args)
            except Exception as error:
                self.swallowed.append(error)


class ExtraNetwork:
    """The base of a handler of tags."""

    def __init__(self, name: str) -> None:
        self.name = name


class ExtraNetworkLora(ExtraNetwork):
    """The host's own: lists the networks that layers have to merge."""

    def __init__(self, host: FakeHost) -> None:
        super().__init__("lora")
        self.host = host

    def activate(self, p: Any, params_list: list[ExtraNetworkParams]) -> None:
        """Load what the tags ask for, and nothing else; forgets the hashes of others."""
        if p is not None:
            p.lora_hashes = {}
        added = self.host.opts.sd_lora
        if added != "None" and not any(params.items[0] == added for params in params_list):
            params_list.append(ExtraNetworkParams([added, "1"]))
        wanted = []
        for params in params_list:
            numbers = [float(number) for number in params.positional[1:]] or [1.0]
            te = float(params.named.get("te", numbers[0]))
            wanted.append(
                (params.positional[0], te, float(params.named.get("unet", numbers[1] if numbers[1:] else te)))
            )
        self.host.load_networks(wanted)

    def deactivate(self, p: Any) -> None:
        """Nothing."""


class OnDisk:
    """A LoRA file that the host lists."""

    def __init__(self, path: Path) -> None:
        self.name, self.filename = path.stem, str(path)


class ModelData:
    """modules.sd_models.model_data: what is loaded; Forge also has what is to be loaded for the next picture."""

    def __init__(self, host: FakeHost) -> None:
        self._host = host
        if host.family == "forge":
            self.forge_loading_parameters = {"checkpoint": "base"}
            self.forge_hash = str(self.forge_loading_parameters)

    @property
    def sd_model(self) -> Any:
        return self._host.sd_model


class FakeHost:
    """One running WebUI, of `family` a1111, forge, reforge or classic, with the LoRA files of a folder."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family = family
        self.folder = folder
        self.sd_model = Checkpoint(family, "base", 1)
        self.opts = types.SimpleNamespace(
            lora_add_hashes_to_infotext=True, hires_fix_use_firstpass_conds=False, sd_lora="None"
        )
        self.callbacks = Callbacks()
        self.registry: dict[str, Any] = {"lora": ExtraNetworkLora(self)}
        self.aliases: dict[str, Any] = {"lyco": self.registry["lora"]}
        self.loaded: list[Any] = []
        self.evaluations = self.merges = 0
        self.interrupted = False
        self.after_activation: Callable[[], None] = lambda: None
        self.in_unet: Callable[[int], None] = lambda number: None
        self.before_evaluation: Callable[[Processing, Any], None] = lambda p, denoiser: None

    def start(self, register: Callable[[], None]) -> None:
        """Execute the entry script, then build the page."""
        register()
        self.callbacks.call("before_ui")

    def reload_ui(self, register: Callable[[], None]) -> None:
        """All callbacks go; packages stay imported; the entry script is executed again."""
        self.callbacks.call("script_unloaded")
        self.callbacks.known.clear()
        self.start(register)

    def txt2img(self, prompt: str, **values: Any) -> Picture:
        """Make a picture."""
        return self.process(Processing(self, prompt, **values))

    def process(self, p: Processing) -> Picture:
        """Run a job; what the UNet raises ends it without a word to any script."""
        self.evaluations = 0
        self.interrupted = False
        pictures = []
        try:
            for _ in range(p.n_iter):
                p.parse()
                p.hr_c = None
                self.activate(p, p.extra_network_data)
                p.setup_conds()
                pictures.append(p.sample())
            if p.extra_network_data:
                self._each(self._handlers(p.extra_network_data), lambda network, params: network.deactivate(p))
        finally:
            p.close()
        return Picture(torch.cat(pictures), p)

    def activate(self, p: Any, data: Data) -> None:
        """Tell the handlers: first those that are named, in the order of the prompt, then all others, of no tags."""
        named = self._handlers(data)
        self._each(named, lambda network, params: network.activate(p, params))
        others: dict[Any, Any] = {network: [] for network in self.registry.values() if network not in named}
        self._each(others, lambda network, params: network.activate(p, params))
        self.after_activation()

    def _handlers(self, data: Data) -> dict[Any, list[ExtraNetworkParams]]:
        # Lists of their own, made before any handler is told.
        found: dict[Any, list[ExtraNetworkParams]] = {}
        for name, params in data.items():
            network = self.registry.get(name) or self.aliases.get(name)
            if network is not None:
                found.setdefault(network, []).extend(params)
        return found

    def _each(self, data: Mapping[Any, Any], call: Callable[[Any, Any], None]) -> None:
        for network, params in data.items():
            try:
                call(network, params)
            except Exception as error:
                self.callbacks.swallowed.append(error)

    def load_networks(self, wanted: list[tuple[str, float, float]]) -> None:
        """Remember what is wanted; it is merged later, when it is needed."""
        on_disk = sys.modules["networks"].available_network_aliases  # type: ignore[attr-defined]
        wanted = [one for one in wanted if one[0] in on_disk]
        if self.family in FORGES:
            remembered = str([[on_disk[name].filename, unet, te, False] for name, te, unet in wanted])
            if remembered == self.sd_model.current_lora_hash:
                # Also what somebody else has made of the text encoder stays.
                return
            self.sd_model.current_lora_hash = remembered
        self.loaded[:] = [self._network(on_disk[name], te, unet) for name, te, unet in wanted]
        if self.family in FORGES:
            unet_patcher, clip = FORGES[self.family](), self.sd_model.clip.clone()
            for net in self.loaded:
                text = {name: module.delta for name, module in net.modules.items() if name.startswith("transformer_")}
                name = {"filename": net.network_on_disk.filename} if self.family == "forge" else {}
                clip.add_patches(patches=text, strength_patch=net.te_multiplier, **name)
                unet_patcher.add_patches(patches=net.modules, strength_patch=net.unet_multiplier, **name)
            self.sd_model.patch_unet(unet_patcher, clip)

    def _network(self, found: OnDisk, te: float, unet: float) -> Any:
        net = Network(found.name, found)
        net.te_multiplier, net.unet_multiplier = te, unet
        net.mentioned_name = found.name
        # The host knows one spelling only.
        names = {
            f"lora_unet_{name.replace('.', '_')}": f"diffusion_model_{unet_ldm(name, 4).replace('.', '_')}"
            for name in self.sd_model.diffusion.layers
        } | {f"lora_te_{TEXT_LAYER}": f"transformer_{TEXT_LAYER}"}
        tensors = load_file(found.filename)
        for key, name in names.items():
            if f"{key}.lora_up.weight" in tensors:
                weights = {end: tensors[f"{key}.{end}"] for end in ("lora_up.weight", "lora_down.weight")}
                alpha = tensors.get(f"{key}.alpha", torch.tensor(float(len(weights["lora_down.weight"]))))
                net.modules[name] = NetworkModule({**weights, "alpha": alpha})
        return net

    def sampling_prepare(self) -> None:
        """Forge: merge now, and only where something has changed since last time."""
        model = self.sd_model
        wanted = model.forge_objects.unet.acting()
        if model.merged == wanted:
            return
        layers = {unet_ldm(name, 4).replace(".", "_"): layer for name, layer in model.diffusion.layers.items()}
        with torch.no_grad():
            for sign, acting in ((-1, model.merged), (1, wanted)):
                for modules, strength in acting:
                    for name, module in modules.items():
                        layer = layers.get(name.removeprefix("diffusion_model_"))
                        if layer is not None:
                            restore(layer) if sign < 0 else merge(layer, strength * module.delta)
                            self.merges += sign > 0
        model.merged = list(wanted)


class Network:
    """A loaded LoRA; the host tells two apart by name and strengths."""

    def __init__(self, name: str, on_disk: Any) -> None:
        self.name, self.network_on_disk = name, on_disk
        self.te_multiplier = self.unet_multiplier = 1.0
        self.dyn_dim: int | None = None
        self.mentioned_name = name
        self.modules: dict[str, NetworkModule] = {}


class NetworkModule:
    """One module of a loaded LoRA."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        up, down = tensors["lora_up.weight"], tensors["lora_down.weight"]
        self.delta = up @ down * (float(tensors["alpha"]) / len(down))


class Picture:
    """What came of a job."""

    def __init__(self, pixels: Tensor, p: Processing) -> None:
        self.pixels, self.p = pixels, p

    @property
    def comments(self) -> str:
        return "\n".join(self.p.comments)

    def same(self, other: Picture) -> bool:
        """True for the very same pixels."""
        return torch.equal(self.pixels, other.pixels)

    def close_to(self, other: Picture) -> bool:
        """True but for rounding."""
        return torch.allclose(self.pixels, other.pixels, rtol=1e-4, atol=1e-5)


def _apply_weights(host: FakeHost) -> Callable[[nn.Module], None]:
    def apply_weights(layer: nn.Module) -> None:
        wanted = tuple((net.name, net.te_multiplier, net.unet_multiplier, net.dyn_dim) for net in host.loaded)
        if getattr(layer, "network_current_names", ()) == wanted:
            return
        name: str = layer.network_layer_name  # type: ignore[assignment]
        with torch.no_grad():
            restore(layer)
            for net in host.loaded:
                if name in net.modules:
                    host.merges += 1
                    strength = net.te_multiplier if name.startswith("transformer_") else net.unet_multiplier
                    merge(layer, strength * net.modules[name].delta)
        layer.network_current_names = wanted  # type: ignore[assignment]

    return apply_weights


@contextmanager
def installed(family: str, folder: Path) -> Iterator[FakeHost]:
    """Put a host's modules in place; `folder` holds its LoRA files."""
    host = FakeHost(family, folder)
    fakes = {module.__name__: module for module in _modules(host)}
    before = {name: sys.modules.get(name) for name in fakes}
    sys.modules.update(fakes)
    Processing.cached_c = Processing.cached_hr_c = None
    try:
        fakes["networks"].list_available_networks()  # type: ignore[attr-defined]
        yield host
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _modules(host: FakeHost) -> Iterator[types.ModuleType]:
    def module(name: str, **contents: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        vars(made).update(contents)
        return made

    shared = types.ModuleType("modules.shared")
    shared.__class__ = type("Shared", (types.ModuleType,), {"sd_model": property(lambda _: host.sd_model)})
    shared.opts = host.opts  # type: ignore[attr-defined]
    shared.state = types.SimpleNamespace(textinfo=None)  # type: ignore[attr-defined]
    shared.cmd_opts = types.SimpleNamespace(no_hashing=False)  # type: ignore[attr-defined]
    yield module("modules", __path__=[])
    yield shared
    yield module("modules.sd_models", model_data=ModelData(host))
    yield module("modules.paths", data_path=str(host.folder))
    yield host.callbacks
    yield module("modules.sd_samplers_common", setup_img2img_steps=setup_img2img_steps)
    yield module(
        "modules.extra_networks",
        ExtraNetwork=ExtraNetwork,
        extra_network_registry=host.registry,
        extra_network_aliases=host.aliases,
        register_extra_network=lambda network: host.registry.__setitem__(network.name, network),
    )
    yield module("extra_networks_lora", ExtraNetworkLora=ExtraNetworkLora)
    networks = module(
        "networks",
        loaded_networks=host.loaded,
        available_networks={},
        available_network_aliases={},
        forbidden_network_aliases={},
    )

    def list_available_networks() -> None:
        networks.available_networks.clear()
        networks.available_network_aliases.clear()
        for path in sorted(host.folder.rglob("*.safetensors")):
            networks.available_networks[path.stem] = networks.available_network_aliases[path.stem] = OnDisk(path)

    networks.load_networks = lambda names, te, unet: host.load_networks(  # type: ignore[attr-defined]
        list(zip(names, te, unet, strict=True))
    )
    networks.list_available_networks = list_available_networks  # type: ignore[attr-defined]
    if host.family == "a1111":
        networks.apply_weights = _apply_weights(host)  # type: ignore[attr-defined]
        networks.convert_diffusers_name_to_compvis = lambda key, is_sd2: key.replace("lora_te_", "transformer_")  # type: ignore[attr-defined]
        kind = types.SimpleNamespace(create_module=lambda net, weights: NetworkModule(weights.w))
        networks.module_types = [kind]  # type: ignore[attr-defined]
        yield module("network", Network=Network, NetworkWeights=_network_weights)
    else:
        packages = ("backend", "backend.patcher") if host.family == "forge" else ("ldm_patched", "ldm_patched.modules")
        for package in packages:
            yield module(package, __path__=[])
        load_lora = _load_patches if host.family == "reforge" else _load_lora
        yield module(f"{packages[-1]}.lora", load_lora=load_lora, model_lora_keys_clip=_clip_keys)
    yield networks


def _network_weights(network_key: str, sd_key: str, w: dict[str, Tensor], sd_module: nn.Module) -> Any:
    return types.SimpleNamespace(network_key=network_key, sd_key=sd_key, w=w, sd_module=sd_module)


def _clip_keys(model: nn.Module, key_map: dict[str, str]) -> dict[str, str]:
    return {**key_map, f"lora_te1_{TEXT_LAYER}": "clip_l.weight"}


def _load_lora(tensors: Mapping[str, Tensor], keys: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    found, rest = {}, dict(tensors)
    for key, target in keys.items():
        mine = {
            end: rest.pop(f"{key}.{end}")
            for end in ("lora_up.weight", "lora_down.weight", "alpha")
            if f"{key}.{end}" in rest
        }
        if mine:
            found[target] = NetworkModule(mine).delta
    return found, rest


def _load_patches(tensors: Mapping[str, Tensor], keys: Mapping[str, str]) -> dict[str, Tensor]:
    return _load_lora(tensors, keys)[0]


assert TEXT.replace(".", "_").endswith(TEXT_LAYER)
