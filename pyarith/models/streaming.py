"""Models larger than memory: the weights of a layer are there while it computes, and the next ones are on their way.

On a CPU, in the dtype of the file, parameters are read-only views of the memory-mapped checkpoint. On another device,
or in another dtype, the layers share two buffers in turn: even layers live in one, odd layers in the other, and a
background thread fills one while the model computes from the other. (In parallel blocks the heads of one layer and the
MLP of the next are needed at once: there are three buffers.) Embedding and unembedding stay in the file then, too:
their rows are gathered, and what needs all of the unembedding takes it in chunks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyarith.errors import InputError, InputTypeError, UnsupportedModelError, check
from pyarith.models.checkpoint import Checkpoint
from pyarith.models.families import FAMILIES
from pyarith.models.sites import STREAM, supported_families
from pyarith.models.spec import FamilySpec

_ALIGNMENT = 256  # bytes between tensors in a buffer are rounded up to this: what GEMMs like
_SHOWN = 4
_CHUNK = 2**21  # numbers of the unembedding that are brought to the device at a time


class LayerStream:
    """The layers of one model, brought in one after the other. Made by ``stream_checkpoint``.

    Attributes:
        device, dtype: where and in what the model computes.
        buffered: True where layers share two buffers, False where they are views of the file.
    """

    def __init__(self, blocks: list[tuple[str, nn.Module]], checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._names = [[f"{path}.{name}" for name, _ in block.named_parameters()] for path, block in blocks]
        self.device, self.dtype = torch.device("cpu"), next(blocks[0][1].parameters()).dtype
        self.buffered = False
        self._paused = False
        # a hook of ours on every block, so that whoever runs the model finds the layer's weights there
        self.hooks = {block.register_forward_pre_hook(_Ready(self, i)).id for i, (_, block) in enumerate(blocks)}

    @property
    def n_layers(self) -> int:
        return len(self._names)

    def ready(self, layer: int) -> None:
        """Let layer's weights be there for what is computed from now on, and start on the next layer's."""
        if layer + 1 < self.n_layers:
            self.checkpoint.will_need(self._names[layer + 1])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Blocks may be called without their weights: they do not compute."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    @property
    def sources(self) -> dict[str, Tensor]:
        """The tensors of the file by name, where the model's parameters do not hold them all the time."""
        return {}


class BufferedStream(LayerStream):
    """Two buffers on ``device``, in which the layers take turns.

    A layer's parameters stay views of the same buffer, so whoever holds them holds the layer that is there now.
    """

    def __init__(
        self,
        blocks: list[tuple[str, nn.Module]],
        checkpoint: Checkpoint,
        sources: dict[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        n_buffers: int,
    ) -> None:
        super().__init__(blocks, checkpoint)
        self.device, self.dtype, self.buffered = device, dtype, True
        self._sources = [[sources[name] for name in names] for names in self._names]
        self.layer_bytes = max(sum(map(self._room, sources)) for sources in self._sources)
        count = self.layer_bytes // dtype.itemsize
        self._buffers = [torch.empty(count, dtype=dtype, device=device) for _ in range(min(n_buffers, self.n_layers))]
        self._targets = [self._share(block, self._buffers[self._slot(i)]) for i, (_, block) in enumerate(blocks)]
        self._held: list[int | None] = [None] * len(self._buffers)
        self._coming: tuple[int, Future[None]] | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="pyarith-stream")
        cuda = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if cuda else None
        self._staging = torch.empty(count, dtype=dtype, pin_memory=True) if cuda else None
        self._copied: Any = None  # event behind the last copy out of the staging buffer

    def _room(self, source: Tensor) -> int:
        size = source.numel() * self.dtype.itemsize
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    def _share(self, block: nn.Module, buffer: Tensor) -> list[Tensor]:
        """Make the block's parameters views of a buffer."""
        at, views = 0, []
        for parameter in block.parameters():
            view = buffer[at : at + parameter.numel()].view(parameter.shape)
            at += self._room(parameter) // self.dtype.itemsize
            parameter.data = view
            views.append(view)
        return views

    def _slot(self, layer: int) -> int:
        return layer % len(self._buffers)

    def ready(self, layer: int) -> None:
        slot = self._slot(layer)
        if self._coming is not None:  # always waited for: the buffer that it fills may be the one wanted now
            number, future = self._coming
            self._coming = None
            self._take(number, future.result())
        if self._held[slot] != layer:
            self._take(layer, self._fetch(layer, self._now()))
        following = layer + 1 if layer + 1 < self.n_layers else 0
        # buffers are filled in the order of layers, so the one that is taken is that of the layer left longest ago
        if self._slot(following) != slot and self._held[self._slot(following)] != following:
            self._held[self._slot(following)] = None
            self._coming = following, self._worker.submit(self._fetch, following, self._now())

    def _take(self, layer: int, copied: Any) -> None:
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)
        self._held[self._slot(layer)] = layer

    def _now(self) -> Any:
        """What was put on the device so far, which may still read the buffer that is to be filled."""
        if self._side is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    @torch.no_grad()
    def _fetch(self, layer: int, before: Any) -> Any:
        """Fill the buffer of ``layer``; returns an event behind the last copy, None on a CPU."""
        self.checkpoint.will_need(self._names[layer])
        if self._side is None:
            for target, source in zip(self._targets[layer], self._sources[layer], strict=True):
                target.copy_(source)
            return None
        assert self._staging is not None
        if self._copied is not None:
            self._copied.synchronize()  # the staging buffer is free again
        at = 0
        with torch.cuda.stream(self._side):
            self._side.wait_event(before)
            for target, source in zip(self._targets[layer], self._sources[layer], strict=True):
                staged = self._staging[at : at + source.numel()].view(source.shape)
                at += self._room(source) // self.dtype.itemsize
                target.copy_(staged.copy_(source), non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(self._side)
        return self._copied

    @property
    def sources(self) -> dict[str, Tensor]:
        rows = zip(self._names, self._sources, strict=True)
        return {name: source for names, sources in rows for name, source in zip(names, sources, strict=True)}


class ChunkedLinear(nn.Linear):
    """A linear layer whose weight stays where and as it is; it comes to its input's device and dtype in chunks."""

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:-1], self.out_features)
        step = max(1, _CHUNK // self.in_features)
        for start in range(0, self.out_features, step):
            part = slice(start, start + step)
            out[..., part] = x @ self.weight[part].to(x.device, x.dtype).t()
        return out if self.bias is None else out.add_(self.bias)


class _Ready:
    """The hook before a block."""

    def __init__(self, stream: LayerStream, layer: int) -> None:
        self._stream, self._layer = stream, layer

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not self._stream._paused:
            self._stream.ready(self._layer)


def stream_checkpoint(
    folder: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> Any:
    """The model of a checkpoint folder, whose weights stay in its files until they are computed with.

    ``fast_patch`` and ``discover`` run on it layer by layer, each layer's weights once per block of prompts. On a CPU
    in the file's own dtype the process owns no weights at all: parameters are read-only views of the files (writing to
    one ends the process), the system keeps in memory what fits. Otherwise two layers and the norms are held on
    ``device`` in ``dtype``; embedding and unembedding rows are gathered from the file, all of the unembedding only in
    chunks.

    Args:
        folder: of a Hugging Face model in safetensors, sharded or not; for a hub name fetch it first.
        device: "auto" = cuda where there is one, else cpu.
        dtype: to compute in; None = as stored.
        attn_implementation: as in ``from_pretrained``; None = transformers' choice.
    Returns:
        The model, in evaluation mode.
    Raises:
        InputError: no such folder, a missing, damaged or foreign shard, tensors of wrong shapes (all named).
        UnsupportedModelError: a family that is not described, a quantised checkpoint, or one whose tensors are stored
            in another form than the model holds them.

    Examples:
        >>> import pyarith as pa, pyarith.demo
        >>> model = pa.stream_checkpoint(pyarith.demo.MODEL_DIR)
        >>> model.config.num_hidden_layers
        6
    """
    from transformers import AutoConfig

    folder = Path(folder)
    check((folder / "config.json").is_file(), f"checkpoint: expected a folder with config.json, got {str(folder)!r}")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, attn_implementation=attn_implementation)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(f"checkpoint: cannot read the config in {folder}: {error}") from error
    spec = FAMILIES.get(config.model_type)
    if spec is None:
        raise UnsupportedModelError(
            f"checkpoint: family {config.model_type!r} is not supported; supported are {supported_families()}"
        )
    spec = spec.of(config)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"checkpoint: {folder} holds quantised weights, which cannot be streamed; load the model whole, or stream "
            "its unquantised checkpoint"
        )
    checkpoint = Checkpoint(folder)
    stored = next(t.dtype for t in checkpoint.tensors.values() if t.is_floating_point())
    model = _built(spec.model_class, config, checkpoint, checkpoint.tensors, stored)
    _refuse_copies(model, checkpoint)
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    wanted = stored if dtype is None else dtype
    if place.type == "cpu" and wanted == stored:
        setattr(model, STREAM, LayerStream(_blocks(model, spec), checkpoint))
        return model
    # the same model in the dtype wanted, buffers and all, with parameters that take no memory
    sources = {name: parameter.data for name, parameter in model.named_parameters()}
    nothing = {name: torch.zeros(1, dtype=wanted).expand(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    model = _built(spec.model_class, config, checkpoint, nothing, wanted)
    stream = BufferedStream(_blocks(model, spec), checkpoint, sources, place, wanted, 3 if spec.parallel else 2)
    setattr(model, STREAM, stream)
    _place_rest(model, model.get_submodule(spec.unembed), sources, stream)
    return model


def _blocks(model: nn.Module, spec: FamilySpec) -> list[tuple[str, nn.Module]]:
    path = f"{spec.decoder}.{spec.blocks}"
    return [(f"{path}.{name}", block) for name, block in model.get_submodule(path).named_children()]


def opened(model: Any) -> Any:
    """``model`` itself, or the streamed model of a checkpoint folder where it is a path.

    Raises:
        InputTypeError: the path is no folder.
        Whatever ``stream_checkpoint`` raises.
    """
    if not isinstance(model, str | Path):
        return model
    check(
        Path(model).is_dir(),
        f"model: expected a model or the folder of a checkpoint, got {type(model).__name__} {str(model)!r}, no "
        "folder here; load a hub model with transformers.AutoModelForCausalLM.from_pretrained",
        InputTypeError,
    )
    return stream_checkpoint(model)


def _built(
    model_class: str, config: Any, checkpoint: Checkpoint, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Any:
    """A model in evaluation mode with these tensors for parameters, which transformers takes as they are."""
    import transformers
    from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = getattr(transformers, model_class).from_pretrained(
            None,
            config=copy.deepcopy(config),
            state_dict=dict(tensors),
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        if bar:
            logging.enable_progress_bar()
    missing, wrong = sorted(info["missing_keys"]), sorted(map(str, info["mismatched_keys"]))
    check(
        not missing,
        f"checkpoint: {checkpoint.folder} lacks {len(missing)} tensors that {model_class} needs: "
        f"{', '.join(missing[:_SHOWN])}; fetch it again",
    )
    check(
        not wrong,
        f"checkpoint: {checkpoint.folder}: {len(wrong)} tensors (name, shape in the file, shape in the model) do not "
        f"fit its config: {'; '.join(wrong[:_SHOWN])}",
    )
    model.config._name_or_path = str(checkpoint.folder)
    return model.eval().requires_grad_(False)


def _refuse_copies(model: nn.Module, checkpoint: Checkpoint) -> None:
    starts = {tensor.data_ptr() for tensor in checkpoint.tensors.values()}
    copied = [name for name, p in model.named_parameters() if p.numel() and p.data_ptr() not in starts]
    if copied:
        raise UnsupportedModelError(
            f"checkpoint: {checkpoint.folder}: {len(copied)} tensors are stored in another form or dtype than "
            f"{type(model).__name__} holds them ({', '.join(copied[:_SHOWN])}), so they cannot be streamed; load the "
            "model whole, or save it once in that form with model.save_pretrained(folder, save_original_format=False)"
        )


def _place_rest(model: Any, unembed: Any, sources: dict[str, Tensor], stream: BufferedStream) -> None:
    """Norms and buffers go to the device; rows of embedding and unembedding are looked up in the file."""
    embedding = model.get_input_embeddings()
    unembed.__class__ = ChunkedLinear
    for name, parameter in model.named_parameters():
        if name in stream.sources:
            continue
        stays = parameter is embedding.weight or parameter is unembed.weight
        parameter.data = sources[name] if stays else sources[name].to(stream.device, stream.dtype, copy=True)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(stream.device)
    stream.hooks |= _gather_rows(embedding, stream)


def _gather_rows(embedding: nn.Embedding, stream: BufferedStream) -> set[int]:
    """Let an embedding look into a table of the rows that a call needs, read from the file; ids of its hooks."""
    source, padding = embedding.weight.data, embedding.padding_idx

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> Any:
        # where the unembedding is the same parameter, it has it back before it is called
        wanted, places = args[0].cpu().unique(return_inverse=True)
        embedding.weight.data = source[wanted].to(stream.device, stream.dtype)
        embedding.padding_idx = None  # would be looked for in the small table; it matters for gradients only
        return (places.to(stream.device), *args[1:])

    def after(*_: Any) -> None:
        embedding.weight.data, embedding.padding_idx = source, padding

    return {embedding.register_forward_pre_hook(before).id, embedding.register_forward_hook(after, always_call=True).id}
