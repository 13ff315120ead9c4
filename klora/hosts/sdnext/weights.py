"""Weights of SD.Next's layers as plain tensors, however they are stored."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from torch import Tensor

from klora.engine.site import Site


def with_plain_weight(site: Site) -> Site:
    """Say how to get at a weight that SDNQ, SD.Next's own quantisation, has packed; leave any other site as it is."""
    if getattr(site.module, "sdnq_dequantizer", None) is not None:
        return dataclasses.replace(site, weight=partial(_dequantized, site.module))
    return site


def _dequantized(layer: Any) -> Tensor:
    packed = (layer.weight, layer.scale, layer.zero_point, layer.svd_up, layer.svd_down)
    dequantizer = layer.sdnq_dequantizer
    # A weight that is multiplied as it is stored lies transposed, which this undoes.
    weight: Tensor = dequantizer(*packed, skip_quantized_matmul=dequantizer.use_quantized_matmul)
    return weight
