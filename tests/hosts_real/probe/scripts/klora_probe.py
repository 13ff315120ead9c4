"""A test's eyes and hands inside a running host: what its model is like now, and faults on demand. For tests only."""

import importlib
import importlib.util
import sys
import types
import zlib

import numpy
import torch
from modules import script_callbacks, scripts, shared

PREFIX = "/klora-probe"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# No checkpoint of SD 1 holds these two, and Neo draws what is not there anew at each load.
UNUSED = ("text_projection.weight", "logit_scale")
levels, said, wrapped = [], [], []


def parts():
    model = shared.sd_model
    if hasattr(model, "forge_objects"):
        objects = model.forge_objects
        return {"unet": objects.unet.model.diffusion_model, "text": objects.clip.cond_stage_model}
    return {"unet": model.model.diffusion_model, "text": model.cond_stage_model}


def digest(module):
    """Checksum all parameters and buffers; not a cryptographic hash, which would cost more than a picture."""
    found = 0
    for name, tensor in sorted({**dict(module.named_parameters()), **dict(module.named_buffers())}.items()):
        if name.endswith(UNUSED):
            continue
        found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), found)
        if tensor.numel():
            found = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, found)
    return found


def state(hashes: bool = True):
    """Describe the loaded model: hooks, instance attributes that shadow methods, and the hash of all parameters."""
    found = {}
    for name, module in parts().items():
        modules = list(module.modules())
        found[name] = {
            "hooks": sum(len(getattr(one, kind)) for one in modules for kind in HOOKS),
            "shadowed": sorted({key for one in modules for key in vars(one) if hasattr(type(one), key)} - {"training"}),
            "hash": digest(module) if hashes else 0,
        }
    networks = sys.modules.get("networks")
    found["loaded"] = [net.name for net in getattr(networks, "loaded_networks", [])]
    return found


def fault(kind: str, after: int = 2):
    """Make the UNet's evaluation number `after` raise, or end the job there; once."""
    unet = parts()["unet"]
    count = 0

    def hook(module, args):
        nonlocal count
        count += 1
        if count < after:
            return
        handle.remove()
        if kind == "interrupt":
            shared.state.interrupt()
        elif kind == "skip":
            shared.state.skip()
        elif kind == "oom":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (a test's)")
        else:
            raise RuntimeError("a test's fault in the UNet")

    handle = unet.register_forward_pre_hook(hook)
    return {}


def record():
    """Begin to note the noise level and τ of every evaluation that K-LoRA follows."""
    session = importlib.import_module("klora.engine.session").Session
    levels.clear()
    if not hasattr(session, "probed"):
        original = session.probed = session.at_level

        def at_level(self, level):
            original(self, level)
            levels.append((level, self.tau))

        session.at_level = at_level
    return {}


def recorded():
    """End it and give the notes."""
    session = importlib.import_module("klora.engine.session").Session
    if hasattr(session, "probed"):
        session.at_level = session.probed
        del session.probed
    return levels


class Detector:
    """Stands for a detector of ultralytics, as ADetailer uses it: it finds the middle of every picture."""

    def __init__(self, path):
        self.masks = None
        self.boxes = types.SimpleNamespace()

    def __call__(self, image, **_):
        width, height = image.size
        self.boxes.xyxy = torch.tensor([[width / 4, height / 4, 3 * width / 4, 3 * height / 4]])
        self.boxes.conf = torch.tensor([0.9])
        self.plot = lambda: numpy.asarray(image.convert("RGB"))
        return [self]


for missing in ("ultralytics", "mediapipe"):
    # After a reload of the UI they are there.
    if missing not in sys.modules and importlib.util.find_spec(missing) is None:
        sys.modules[missing] = types.ModuleType(missing)
        sys.modules[missing].YOLO = Detector


class Listener(scripts.Script):
    """Hears the comments under the images, which the API does not tell."""

    def title(self):
        return "K-LoRA probe"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def process_before_every_sampling(self, p, *args, **kwargs):
        if not wrapped:
            return
        unet = parts()["unet"]
        if hasattr(p.sd_model, "forge_objects"):
            patcher = p.sd_model.forge_objects.unet.clone()
            patcher.set_model_unet_function_wrapper(through_wrapper)
            p.sd_model.forge_objects.unet = patcher
        elif "forward" not in vars(unet):
            original = unet.forward

            def forward(*args, **kwargs):
                wrapped.append("call")
                return original(*args, **kwargs)

            unet.forward = forward

    def postprocess(self, p, processed, *args):
        said[:] = [processed.comments]
        if wrapped and not hasattr(p.sd_model, "forge_objects"):
            del parts()["unet"].forward


def through_wrapper(apply_model, args):
    wrapped.append("call")
    return apply_model(args["input"], args["timestep"], **args["c"])


def wrap(on: bool):
    """Wrap the model as ControlNet does, from now on or no longer; give how often the wrapper was called."""
    calls = wrapped.count("call")
    wrapped[:] = ["on"] if on else []
    return calls


def comments():
    """Give what stood under the last image."""
    return said


def seed():
    """Begin torch's own random numbers anew; hosts draw from them where they encode a picture, or inpaint."""
    torch.manual_seed(0)
    return {}


def reload():
    """Press "Reload UI"."""
    shared.state.request_restart()
    return {}


def add_routes(_, app):
    for route in (state, fault, record, recorded, comments, seed, wrap, reload):
        app.add_api_route(f"{PREFIX}/{route.__name__}", route, methods=["GET"])


script_callbacks.on_app_started(add_routes)
