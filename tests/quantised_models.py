"""Tiny models with linears quantised by bitsandbytes and torchao, loaded as any other from a folder."""

from __future__ import annotations

import logging
from typing import Any

import tiny_models
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
GPT2_SIZES = {"n_embd": 64, "n_inner": 128, "n_layer": 2}
# what a row gets depends on nothing but the row, to rounding
EXACT = ("nf4", "fp4-double", "torchao-int8", "torchao-int4")
INT8 = ("int8", "int8-no-outliers", "torchao-int8-activations")
KINDS = (*EXACT, *INT8)


def config(kind: str) -> Any:
    """The quantisation config of a kind."""
    if kind.startswith("torchao"):
        from torchao import quantization as ao

        of = {
            "torchao-int8": lambda: ao.Int8WeightOnlyConfig(),
            "torchao-int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(16)),
            "torchao-int8-activations": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
        }
        return TorchAoConfig(of[kind]())
    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    of = {
        "nf4": {**four, "bnb_4bit_quant_type": "nf4"},
        "fp4-double": {**four, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
        "int8": {"load_in_8bit": True, "llm_int8_threshold": 2.0},  # low, so that tiny models have outliers
        "int8-no-outliers": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    }
    return BitsAndBytesConfig(**of[kind])


def load(folder: Any, kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> torch.nn.Module:
    """A checkpoint folder, quantised while it is loaded."""
    log = logging.getLogger("transformers")
    level, log.level = log.level, logging.ERROR  # a CPU is what these tests want
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=options.pop("quantization", None) or config(kind), dtype=dtype, **options
        )
    finally:
        log.level = level
    return model.eval()


def save(folder: Any, name: str = "llama-gqa2", dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A tiny model of a family in a folder."""
    sizes = GPT2_SIZES if name == "gpt2" else SIZES
    model = tiny_models.make(name, dtype, **{**sizes, **overrides})
    model.config._experts_implementation = None  # which a saved config would carry into models without experts
    model.save_pretrained(folder)
    return folder
