"""Nodes and routes for the tests: small models of ComfyUI's own classes, made of random numbers, and looks into them.

Runs inside ComfyUI, so that nothing of this repository is imported.
"""

import hashlib
import sys
import tempfile
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models as supported
import comfy.supported_models_base
import nodes
import torch
from aiohttp import web
from server import PromptServer

UNET = {
    "use_checkpoint": False,
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
}
KINDS = {
    "sd1": (
        supported.SD15,
        {
            **UNET,
            "num_res_blocks": [2, 2, 2, 2],
            "channel_mult": [1, 2, 4, 4],
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_middle": 1,
            "transformer_depth_output": [1] * 9 + [0] * 3,
            "context_dim": 768,
            "use_linear_in_transformer": False,
            "adm_in_channels": None,
            "use_temporal_attention": False,
        },
    ),
    "sdxl": (
        supported.SDXL,
        {
            **UNET,
            "num_res_blocks": [2, 2, 2],
            "channel_mult": [1, 2, 4],
            "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_middle": 10,
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "context_dim": 2048,
            "use_linear_in_transformer": True,
            "adm_in_channels": 2816,
            "num_classes": "sequential",
            "num_head_channels": 32,
            "use_temporal_attention": False,
        },
    ),
    "flux": (
        supported.Flux,
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "vec_in_dim": 32,
            "context_in_dim": 64,
            "hidden_size": 64,
            "mlp_ratio": 4.0,
            "num_heads": 2,
            "depth": 2,
            "depth_single_blocks": 3,
            "axes_dim": [8, 12, 12],
            "theta": 10000,
            "qkv_bias": True,
            "guidance_embed": True,
        },
    ),
    "qwen": (
        supported.QwenImage,
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "num_layers": 3,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 64,
            "axes_dims_rope": (8, 12, 12),
        },
    ),
}
CONDITIONS = {"sd1": (77, 768, 0), "sdxl": (77, 2048, 1280), "flux": (16, 64, 32), "qwen": (16, 64, 0)}
DTYPES = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, torch.float32),
    "fp8": (torch.float8_e4m3fn, torch.float32),
    "low vram": (torch.float32, None),
    "Q8_0": (torch.float32, None),
    "Q4_0": (torch.float32, None),
}
_models = {}


class LowVramPatcher(comfy.model_patcher.ModelPatcher):
    """Loads as on a GPU that has room for nothing, which `--lowvram` and `--novram` cannot ask of a CPU."""

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        super().load(device_to, 0.1, force_patch_weights, full_load=False)


def _stored_as_gguf(kind, config, model):
    """The same model by ComfyUI-GGUF's layers, its weights from a GGUF file, and a patcher of its own."""
    import gguf

    loader = sys.modules[nodes.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"].__module__]
    stored = gguf.GGMLQuantizationType[kind]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        writer = gguf.GGUFWriter(str(path), "flux")
        for name, tensor in model.diffusion_model.state_dict().items():
            packed = tensor.ndim == 2 and tensor.shape[1] % 32 == 0
            as_type = stored if packed else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), as_type), raw_dtype=as_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        # The loader's tensors are views of the file.
        weights = {name: tensor.to("cpu", copy=True) for name, tensor in loader.gguf_sd_loader(str(path)).items()}
    config.custom_operations = loader.GGMLOps()
    model = config.get_model({}, "")
    model.diffusion_model.load_state_dict(weights)
    return model, loader.GGUFModelPatcher


def _fill(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            drawn *= 0.6 * parameter[0].numel() ** -0.5
        elif name.endswith(("weight", "scale")):
            drawn = 1 + 0.1 * drawn
        else:
            drawn *= 0.1
        parameter.copy_(drawn.to(parameter.dtype))


class ProbeModel:
    """A small model with ComfyUI's own code; the same object for the same inputs."""

    FUNCTION, RETURN_TYPES, CATEGORY = "make", ("MODEL",), "klora probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": (list(KINDS), {}), "dtype": (list(DTYPES), {})}}

    def make(self, kind, dtype):
        key = (kind, dtype)
        if key not in _models:
            config_class, unet_config = KINDS[kind]
            weight, compute = DTYPES[dtype]
            config = config_class({**unet_config, "dtype": weight})
            config.set_inference_dtype(weight, compute)
            model = config.get_model({}, "")
            _fill(model.diffusion_model, 7)
            patcher = LowVramPatcher if dtype == "low vram" else comfy.model_patcher.ModelPatcher
            if dtype.startswith("Q"):
                model, patcher = _stored_as_gguf(dtype, config, model)
            model.eval()
            devices = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
            _models[key] = patcher(model, *devices)
        return (_models[key].clone(),)


class ProbeConditioning:
    """Random conditioning."""

    FUNCTION, RETURN_TYPES, CATEGORY = "make", ("CONDITIONING",), "klora probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": (list(KINDS), {}), "seed": ("INT", {})}}

    def make(self, kind, seed):
        tokens, width, pooled = CONDITIONS[kind]
        generator = torch.Generator().manual_seed(seed)
        condition = torch.randn(1, tokens, width, generator=generator)
        more = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
        return ([[condition, more]],)


class ProbeClip:
    """A CLIP of two layers."""

    FUNCTION, RETURN_TYPES, CATEGORY = "make", ("CLIP",), "klora probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        if "clip" not in _models:
            target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
            options = {
                "clip_l_model_config": {"num_hidden_layers": 2, "intermediate_size": 256},
                "dtype": torch.float32,
            }
            clip = comfy.sd.CLIP(target, model_options=options)
            _fill(clip.cond_stage_model, 8)
            _models["clip"] = clip
        return (_models["clip"].clone(),)


class ProbeFault:
    """Has the n-th call of the model fail, end the job, or wait."""

    FUNCTION, RETURN_TYPES, CATEGORY = "make", ("MODEL",), "klora probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "kind": (["error", "interrupt"], {}), "after": ("INT", {})}}

    @classmethod
    def IS_CHANGED(cls, **inputs):
        return float("nan")

    def make(self, model, kind, after):
        calls = []

        def wrapper(apply, args):
            calls.append(None)
            if len(calls) > after:
                if kind == "interrupt":
                    raise comfy.model_management.InterruptProcessingException()
                raise RuntimeError("a fault for a test")
            return apply(args["input"], args["timestep"], **args["c"])

        model = model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return (model,)


class ProbeMixed:
    """Guidance between two clones of one model: its noise is the mean of both, each called in the midst of a pass."""

    FUNCTION, RETURN_TYPES, CATEGORY = "make", ("MODEL",), "klora probe"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "other": ("MODEL",)}}

    def make(self, model, other):
        def wrapper(apply, args):
            first = apply(args["input"], args["timestep"], **args["c"])
            c = dict(args["c"])
            c["transformer_options"] = {**c["transformer_options"], "wrappers": other.wrappers}
            return (first + apply(args["input"], args["timestep"], **c)) / 2

        model = model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return (model,)


def _state(module):
    digest = hashlib.sha256()
    # Not by `state_dict`, which GGUF layers make up, and without their class, which makes up shapes.
    for name, tensor in sorted({**dict(module.named_parameters()), **dict(module.named_buffers())}.items()):
        digest.update(name.encode())
        plain = tensor.data.as_subclass(torch.Tensor)
        digest.update(plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    hooks = sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in module.modules())
    own = sum("forward" in vars(one) for one in module.modules())
    return {"hooks": hooks, "wrapped": own, "sha256": digest.hexdigest()}


@PromptServer.instance.routes.get("/klora-probe/state")
async def state(request):
    comfy.model_management.unload_all_models()
    found = {}
    for key, held in _models.items():
        module = held.cond_stage_model if key == "clip" else held.model
        found["/".join(key) if isinstance(key, tuple) else key] = _state(module)
    return web.json_response(found)


@PromptServer.instance.routes.get("/klora-probe/shapes")
async def shapes(request):
    config_class, unet_config = KINDS[request.query["kind"]]
    model = config_class({**unet_config, "dtype": torch.float32}).get_model({}, "", device="meta")
    modules = model.diffusion_model.named_modules()
    weights = {name: list(one.weight.shape) for name, one in modules if getattr(one, "weight", None) is not None}
    return web.json_response({name: shape for name, shape in weights.items() if len(shape) in (2, 4)})


NODE_CLASS_MAPPINGS = {one.__name__: one for one in (ProbeModel, ProbeConditioning, ProbeClip, ProbeFault, ProbeMixed)}
