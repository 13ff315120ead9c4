"""A test's eyes and hands inside a running SD.Next: what its model is like, and faults on demand. For tests only."""

import hashlib
import importlib

import torch
from fastapi import Body
from modules import processing, prompt_parser_diffusers, script_callbacks, sd_models, shared
from modules.lora import lora_load

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
taus = []


def pipeline():
    return getattr(shared.sd_model, "pipe", None) or shared.sd_model


def parts():
    pipe = pipeline()
    return {"denoiser": getattr(pipe, "unet", None) or pipe.transformer, "text": pipe.text_encoder}


def state():
    """Count the hooks on the loaded model, and give the hash of all its parameters."""
    found = {}
    for name, module in parts().items():
        digest = hashlib.blake2b(digest_size=32)
        for key, tensor in sorted(dict(module.named_parameters()).items()):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        hooks = sum(len(getattr(one, kind)) for one in module.modules() for kind in HOOKS)
        found[name] = {"hooks": hooks, "hash": digest.hexdigest()}
    return found


def fault(kind: str, after: int = 2):
    """Make the denoiser's call number `after` raise, or interrupt the job there; once."""
    count = 0

    def hook(module, args):
        nonlocal count
        count += 1
        if count < after:
            return
        handle.remove()
        if kind == "interrupt":
            shared.state.interrupt()
        else:
            raise RuntimeError("a test's fault in the denoiser")

    handle = parts()["denoiser"].register_forward_pre_hook(hook)
    return {}


def record():
    """Begin to note the τ of every call that K-LoRA follows."""
    session = importlib.import_module("klora.engine.session").Session
    taus.clear()
    if not hasattr(session, "probed"):
        original = session.probed = session.at_level

        def at_level(self, level):
            original(self, level)
            taus.append(self.tau)

        session.at_level = at_level
    return {}


def recorded():
    """End it and give the notes."""
    session = importlib.import_module("klora.engine.session").Session
    if hasattr(session, "probed"):
        session.at_level = session.probed
        del session.probed
    return taus


def comments():
    """Give what stood under the last picture."""
    return [processing.processed.comments if processing.processed else ""]


def prepare():
    """Have the host see the files that are there now, and forget what it has read of them."""
    lora_load.lora_cache.clear()
    lora_load.list_available_networks()
    return {}


def load(folder: str, kind: str):
    """Load a pipeline as the host's loaders do, some of which know one repository alone."""
    diffusers = importlib.import_module("diffusers")
    pipe = getattr(diffusers, kind).from_pretrained(folder)
    pipe.sd_checkpoint_info = pipeline().sd_checkpoint_info
    pipe.sd_model_hash, pipe.has_accelerate = None, False
    sd_models.model_data.sd_model = pipe
    # By prompts alone; the host's own loading clears it.
    prompt_parser_diffusers.cache.clear()
    return prepare()


def quantise(body=Body(None)):  # noqa: B008
    """Have the loaded denoiser's weights stored by SDNQ."""
    name = "unet" if hasattr(pipeline(), "unet") else "transformer"
    quantizer = importlib.import_module("modules.sdnq")
    model = quantizer.sdnq_post_load_quant(getattr(pipeline(), name), **body)
    setattr(pipeline(), name, model)
    return {"layers": sum(hasattr(one, "sdnq_dequantizer") for one in model.modules())}


def compile_denoiser():
    """Compile the denoiser, as the host's setting does."""
    parts()["denoiser"].compile(backend="eager")
    return {}


def add_routes(_, app):
    for route in (state, fault, record, recorded, comments, prepare, load, compile_denoiser):
        app.add_api_route(f"/klora-probe/{route.__name__}", route, methods=["GET"])
    app.add_api_route("/klora-probe/quantise", quantise, methods=["POST"])


script_callbacks.on_app_started(add_routes)
