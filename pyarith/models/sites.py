"""From a model to the modules that its family names, or a refusal that says why not.

Nothing here changes the model: modules are looked up, shapes and types compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyarith.errors import InputTypeError, UnsupportedModelError, check
from pyarith.models.adapters import adapter_parameters, base_layer, inner, unwrap
from pyarith.models.families import FAMILIES
from pyarith.models.placement import device_of, is_spread, offloaded_tensors
from pyarith.models.quantised import Quantised, describe, in_features, kind_of, own_parameters, refuse_method
from pyarith.models.spec import FamilySpec

SLICES = "pyarith_slices"  # the module by which an attached SelectiveTuner keeps its slices in a model
STREAM = "pyarith_stream"  # the LayerStream of a model whose weights stay in their files (models/streaming.py)


@dataclass(frozen=True)
class BlockSites:
    """Modules of one decoder block."""

    block: nn.Module
    o_proj: nn.Module
    attn_post_norm: nn.Module | None
    mlp_norm: nn.Module | None
    mlp: nn.Module
    mlp_post_norm: nn.Module | None
    router: nn.Module | None = None

    @property
    def mlp_reads(self) -> nn.Module:
        """The module whose input is the residual stream that the MLP reads."""
        return self.mlp_norm if self.mlp_norm is not None else self.mlp

    @property
    def attn_write(self) -> nn.Module:
        """The module whose output attention adds to the residual stream, times ``ModelSites.residual_scale``."""
        return self.attn_post_norm if self.attn_post_norm is not None else self.o_proj

    @property
    def mlp_write(self) -> nn.Module:
        """The module whose output the MLP adds to the residual stream, times ``ModelSites.residual_scale``."""
        return self.mlp_post_norm if self.mlp_post_norm is not None else self.mlp


@dataclass(frozen=True)
class ModelSites:
    """A supported model: its family, sizes and the modules that the engine needs.

    ``spec`` is the family's with the variants of this model's config applied; ``d_head`` comes from the config where
    the config gives it; ``windows[layer]`` is the sliding window of a layer in tokens, or None; ``residual_scale`` and
    ``logit_scale`` are factors on what blocks write and on the logits (before the softcap), 1 in most families;
    ``device`` is that of the unembedding, where captures and results are kept, ``devices[layer]`` that of a block.
    """

    model: nn.Module
    spec: FamilySpec
    decoder: nn.Module
    blocks: tuple[BlockSites, ...]
    final_norm: nn.Module
    unembed: nn.Module
    parallel: bool
    softcap: float
    residual_scale: float
    logit_scale: float
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_vocab: int
    windows: tuple[int | None, ...]
    device: torch.device
    devices: tuple[torch.device, ...]
    dtype: torch.dtype
    quantised: Quantised | None

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def attention(self) -> str:
        """Name of the attention implementation that the model runs."""
        return str(self.config._attn_implementation)

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def stream(self) -> Any:
        """The ``LayerStream`` of a model whose weights stay in their files, None for any other."""
        return getattr(self.model, STREAM, None)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters by name; streamed and offloaded ones from where they are kept."""
        sources = offloaded_tensors(self.model) if self.stream is None else self.stream.sources
        for name, parameter in self.model.named_parameters():
            yield name, sources.get(name, parameter)

    def ready(self, layer: int) -> None:
        """Say before weights of a layer are used outside its forward: streamed ones must be brought in first."""
        if self.stream is not None:
            self.stream.ready(layer)

    @property
    def group(self) -> int:
        """Query heads that share one key and value head."""
        return self.n_heads // self.n_kv_heads

    def qkv_rows(self, part: str, head: int) -> tuple[str, int]:
        """Where the d_head rows of W_Q, W_K or W_V of one head begin: (path of the projection in a block, first row).

        Args:
            part: "q", "k" or "v".
            head: a query head for "q", a kv head for "k" and "v".
        """
        spec = self.spec.qkv
        if spec.qkv is None:
            return {"q": spec.q, "k": spec.k, "v": spec.v}[part], head * self.d_head
        if spec.order == "by_group":
            group, place = (head // self.group, head % self.group) if part == "q" else (head, self.group)
            return spec.qkv, (group * (self.group + 2) + place + (part == "v")) * self.d_head
        before = {"q": 0, "k": self.n_heads, "v": self.n_heads + self.n_kv_heads}[part]
        return spec.qkv, (before + head) * self.d_head

    @property
    def row_dtype(self) -> torch.dtype:
        """Dtype of residual rows: fp32, or fp64 for fp64 models."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def scaled(self, write: Tensor) -> Tensor:
        """What a block adds to the residual stream, of what its attention or MLP gives."""
        return write if self.residual_scale == 1.0 else write * self.residual_scale

    def logits_of(self, unembedded: Tensor) -> Tensor:
        """The model's logits, of what its unembedding gives: scaled and capped."""
        if self.logit_scale != 1.0:
            unembedded = unembedded * self.logit_scale
        return torch.tanh(unembedded / self.softcap) * self.softcap if self.softcap else unembedded


def length_limits(sites: ModelSites) -> list[tuple[str, int]]:
    """(what, tokens) beyond which the model changes or fails: tables of positions, and ropes that depend on the length
    of whatever goes through the model together, so that a prompt's numbers would depend on its company."""
    config, limits = sites.config, []
    if sites.spec.position_table:
        limits.append((f"{sites.spec.position_table} (config.max_position_embeddings)", config.max_position_embeddings))
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in [ropes, *(value for value in ropes.values() if isinstance(value, dict))]:
        kind = str(rope.get("rope_type", ""))
        if "dynamic" in kind:
            limits.append((f"rope type {kind!r} (config.max_position_embeddings)", config.max_position_embeddings))
        if kind == "longrope":
            name = "original_max_position_embeddings"
            limits.append((f"rope type {kind!r} ({name})", rope[name]))
    return limits


def supported_families() -> str:
    return ", ".join(sorted(FAMILIES))


def is_sharded(parameter: Any) -> bool:
    """Whether a parameter is a shard (DTensor), without importing what defines those."""
    return type(parameter).__name__ == "DTensor"


def resolve(model: Any, *, spread: bool = False) -> ModelSites:
    """Find the sites of ``model``.

    Args:
        spread: the caller can work on weights that are not all in one place: left in their files
            (``stream_checkpoint``), on several devices or offloaded (``device_map``).

    Raises:
        InputTypeError: not a Hugging Face causal language model at all.
        UnsupportedModelError: a family that is not described, or a model that is wrapped,
            on the meta device, spread over devices or quantised in a way that cannot run or be read here; the message
            names the reason.
    """
    check(
        isinstance(model, nn.Module),
        f"model: expected a Hugging Face causal language model (a torch module), got {type(model).__name__}; "
        "load one with transformers.AutoModelForCausalLM.from_pretrained",
        InputTypeError,
    )
    model = unwrap(model)
    config: Any = getattr(model, "config", None)
    check(
        hasattr(config, "model_type"),
        f"model: expected a Hugging Face model with a config, got {type(model).__name__}",
        InputTypeError,
    )
    sharded = next((name for name, parameter in model.named_parameters() if is_sharded(parameter)), None)
    check(
        sharded is None,
        f"model: expected whole parameters, got {sharded} sharded (fully_shard, FSDP2); load the model whole on each "
        "rank: fast_patch and discover share prompts between ranks, and DistributedDataParallel trains the slices of a "
        "SelectiveTuner",
        UnsupportedModelError,
    )
    spec = FAMILIES.get(config.model_type)
    if spec is None or type(model).__name__ != spec.model_class:
        expected = f"class {spec.model_class}" if spec else f"one of the families {supported_families()}"
        raise UnsupportedModelError(
            f"model: expected {expected}, got {type(model).__name__} of family {config.model_type!r}. Supported are "
            f"causal language models of {supported_families()}. Encoders and vision models have no END logit to "
            "follow; a new causal family is one FamilySpec in pyarith.models.families (see CONTRIBUTING.md)"
        )
    refuse_method(model)
    spec = spec.of(config)
    for attribute, reason in spec.refuse_if:
        if getattr(config, attribute, False):
            raise UnsupportedModelError(f"model: family {spec.name!r} with config.{attribute} is refused: {reason}")
    stream = getattr(model, STREAM, None)
    where = "streamed from a checkpoint" if stream is not None else "spread over devices or offloaded by device_map"
    check(
        spread or (stream is None and not is_spread(model)),
        f"model: its weights are {where}, which fast_patch and discover can work with and this cannot; load it whole, "
        "on one device, with AutoModelForCausalLM.from_pretrained",
        UnsupportedModelError,
    )
    device, dtype = _placement(model, spec) if stream is None else (stream.device, stream.dtype)
    return _sites(model, config, spec, device, dtype)


def _placement(model: nn.Module, spec: FamilySpec) -> tuple[torch.device, torch.dtype]:
    # the slices of an attached tuner are no weights of the model
    adapters = adapter_parameters(model)  # nor are adapters, which PEFT keeps in fp32
    named = model.named_parameters()
    weights = [p for name, p in named if not name.startswith(f"{SLICES}.") and id(p) not in adapters]
    devices = {p.device for p in weights}
    if is_spread(model):
        last = device_of(model.get_submodule(spec.unembed))
        devices = set() if last is None else {last}
    if any(d.type == "meta" for d in devices):
        raise UnsupportedModelError("model: weights are on the meta device (no data); load them onto cpu or cuda first")
    if len(devices) != 1:
        raise UnsupportedModelError(
            f"model: one device expected, or a device_map by accelerate, found weights on {sorted(map(str, devices))}; "
            "move the model to one device, or load it with device_map"
        )
    packed = own_parameters(model)
    dtypes = {p.dtype for p in weights if id(p) not in packed}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        raise UnsupportedModelError(
            f"model: one floating-point dtype expected in all weights, found {sorted(map(str, dtypes))}; "
            "cast with model.to(dtype); quantised weights must come from bitsandbytes or torchao"
        )
    return devices.pop(), dtypes.pop()


def _sites(model: nn.Module, config: Any, spec: FamilySpec, device: torch.device, dtype: torch.dtype) -> ModelSites:
    def find(root: nn.Module, path: str, where: str) -> nn.Module:
        try:
            return inner(root.get_submodule(path))
        except AttributeError:
            raise UnsupportedModelError(
                f"model: family {spec.name!r}, {where}: expected a module {path!r}, found "
                f"{[name for name, _ in root.named_children()]}"
            ) from None

    decoder = find(model, spec.decoder, "model")
    blocks = []
    n_heads = config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    for layer, block in enumerate(find(decoder, spec.blocks, "decoder").children()):
        where = f"layer {layer}"

        def optional(path: str | None, block: nn.Module = block, where: str = where) -> nn.Module | None:
            return find(block, path, where) if path else None

        o_proj = find(block, spec.o_proj, where)
        found = in_features(base_layer(o_proj))
        if found != n_heads * d_head:
            raise UnsupportedModelError(
                f"model: family {spec.name!r}, {where}: expected {spec.o_proj} to read n_heads * d_head = "
                f"{n_heads} * {d_head} = {n_heads * d_head} features, found {found}"
            )
        blocks.append(
            BlockSites(
                block=block,
                o_proj=o_proj,
                attn_post_norm=optional(spec.attn_post_norm),
                mlp_norm=optional(spec.mlp_norm),
                mlp=find(block, spec.mlp, where),
                mlp_post_norm=optional(spec.mlp_post_norm),
                router=getattr(find(block, spec.mlp, where), spec.router, None) if spec.router else None,
            )
        )
    if len(blocks) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"model: family {spec.name!r}: expected {config.num_hidden_layers} layers (config.num_hidden_layers), "
            f"found {len(blocks)}"
        )
    _refuse_shared(spec, blocks)
    unembed = find(model, spec.unembed, "model")
    quantised = describe(model, dtype, device)
    if kind_of(unembed) is not None:
        raise UnsupportedModelError(
            f"model: family {spec.name!r}: the unembedding {spec.unembed} is quantised as {kind_of(unembed)}; its rows "
            "are read as they are, so quantise without it (bitsandbytes: llm_int8_skip_modules, torchao: "
            "modules_to_not_convert)"
        )
    unembed_weight: Any = unembed.weight
    kv_heads = getattr(config, spec.kv_heads, None) if isinstance(spec.kv_heads, str) else spec.kv_heads
    return ModelSites(
        model=model,
        spec=spec,
        decoder=decoder,
        blocks=tuple(blocks),
        final_norm=find(decoder, spec.final_norm, "decoder"),
        unembed=unembed,
        parallel=spec.parallel,
        softcap=float((getattr(config, spec.softcap) if spec.softcap else None) or 0.0),
        residual_scale=_factor(config, spec.residual_multiplier),
        logit_scale=_factor(config, spec.logit_multiplier) / _factor(config, spec.logit_divisor),
        n_heads=n_heads,
        n_kv_heads=kv_heads or n_heads,
        d_head=d_head,
        d_model=config.hidden_size,
        d_vocab=unembed_weight.shape[0],
        windows=_windows(config, len(blocks)),
        device=device,
        devices=tuple(device_of(block.o_proj) or device for block in blocks)
        if is_spread(model)
        else (device,) * len(blocks),
        dtype=dtype,
        quantised=quantised,
    )


def _factor(config: Any, attribute: str | None) -> float:
    """The factor that a config attribute holds; 1 where the family has none.

    Raises:
        UnsupportedModelError: it is not a positive number.
    """
    value = 1.0 if attribute is None else getattr(config, attribute)
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UnsupportedModelError(
            f"model: expected a positive number as config.{attribute}, got {value!r}; with 0 nothing would be left of "
            "what it multiplies"
        )
    return float(value)


def refuse_own_attention(sites: ModelSites, what: str, instead: str) -> None:
    """Raise UnsupportedModelError where attention cannot be replaced or watched: it does not call the
    ``AttentionInterface`` of transformers."""
    check(
        not sites.spec.own_attention,
        f"{what}: family {sites.spec.name!r} computes attention outside transformers' AttentionInterface, where {what} "
        f"works; {instead}",
        UnsupportedModelError,
    )


def _refuse_shared(spec: FamilySpec, blocks: list[BlockSites]) -> None:
    """Hooks tell layers apart by their modules, so a module must not stand in two of them."""
    seen: dict[int, int] = {}
    for layer, block in enumerate(blocks):
        for name, module in vars(block).items():
            if module is not None and seen.setdefault(id(module), layer) != layer:
                raise UnsupportedModelError(
                    f"model: family {spec.name!r}: layers {seen[id(module)]} and {layer} use one module as {name}; "
                    "expected one of its own in each layer (weights may be shared)"
                )


def _windows(config: Any, n_layers: int) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return (window,) * n_layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)
