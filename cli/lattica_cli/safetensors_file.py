"""Write a safetensors file of random tensors, for the demo.

The format: u64 little-endian length of the header; the header, JSON that maps each tensor's name to its dtype, shape
and byte range; the tensors' bytes (https://github.com/huggingface/safetensors, "Format"). Written by hand because that
is all it takes, and the demo should need nothing but this package.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

_HIDDEN = 512
_LAYER_SHAPES = (
    ("self_attn.q_proj.weight", "BF16", (_HIDDEN, _HIDDEN)),
    ("self_attn.o_proj.weight", "BF16", (_HIDDEN, _HIDDEN)),
    ("mlp.up_proj.weight", "BF16", (4 * _HIDDEN, _HIDDEN)),
    ("mlp.down_proj.weight", "BF16", (_HIDDEN, 4 * _HIDDEN)),
    ("input_layernorm.weight", "F32", (_HIDDEN,)),
)
_WIDTH = {"BF16": 2, "F32": 4}
_ALIGNMENT = 8


def write_random_model(path: Path, megabytes: int, seed: int) -> int:
    """Write layers of a transformer with random weights, about `megabytes` MiB; the file's size in bytes."""
    import numpy as np

    layer = sum(_WIDTH[dtype] * int(np.prod(shape)) for _, dtype, shape in _LAYER_SHAPES)
    count = max(1, round(megabytes * 2**20 / layer))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for index in range(count):
        for name, dtype, shape in _LAYER_SHAPES:
            end = offset + _WIDTH[dtype] * int(np.prod(shape))
            entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            header[f"model.layers.{index}.{name}"] = entry
            offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    rng = np.random.default_rng(seed)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(count):
            for _, dtype, shape in _LAYER_SHAPES:
                weights = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
                # bfloat16 is the upper half of a float32.
                file.write((weights.view(np.uint32) >> 16).astype(np.uint16).data if dtype == "BF16" else weights.data)
    return 8 + len(text) + offset
