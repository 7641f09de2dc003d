"""``pyarith merge``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from pyarith.cli.options import Debug, TrustRemoteCode
from pyarith.cli.terminal import Terminal, count, reported


def merge(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The base: folder of a checkpoint, or a Hugging Face hub name.")
    ],
    delta: Annotated[
        Path,
        typer.Argument(metavar="DELTA", help="Folder that save_delta or `pyarith tune` wrote.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the tuned model goes; new or empty.", show_default=False)
    ],
    revision: Annotated[str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a hub model.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """A tuned model as an ordinary checkpoint: the base with a delta's values in it.

    The base is loaded in the dtype that it was trained in, on the CPU. Only the delta's slices change.
    """
    terminal = Terminal()
    with reported(debug):
        from pyarith.cli.loading import load
        from pyarith.cli.terminal import quiet_libraries
        from pyarith.errors import check
        from pyarith.tuning import merge_delta, read_delta

        empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
        check(empty, f"out: expected a new or an empty folder, got {str(out)!r}, which is there; choose another")
        dtype = read_delta(delta).base.dtype.removeprefix("torch.")
        with terminal.step(f"Loading {model}"):
            quiet_libraries()
            loaded = load(
                model,
                dtype=dtype,
                device="cpu",
                revision=revision,
                trust_remote_code=trust_remote_code,
                note=terminal.note,
            )
        merged = merge_delta(loaded.model, delta)
        with terminal.step(f"Writing {out}"):
            n_bytes = save_whole(out, loaded.model, loaded.tokenizer)
        layers = sorted({*(head.layer for head in merged.heads), *merged.mlps})
        where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
        total = sum(parameter.numel() for parameter in loaded.model.parameters())
        terminal.line(f"{model} in {dtype}, fingerprint {merged.base.fingerprint[:19]}: the base of {delta}")
        terminal.line(
            f"Merged {count(len(merged.heads), 'head')} and {count(len(merged.mlps), 'MLP')} in {where}: "
            f"{merged.n_parameters:,} of {total:,} parameters replaced ({merged.n_parameters / total:.2%})"
        )
        terminal.line(f"Wrote {out} ({n_bytes / 2**20:.1f} MiB)")


def save_whole(out: Path, model: Any, tokenizer: Any) -> int:
    """Save a checkpoint beside its place and rename the folder: whoever sees ``out`` sees all of it.

    Returns:
        Bytes written.
    Raises:
        StorageError: it could not be written; nothing is left of it.
    """
    from safetensors import SafetensorError

    from pyarith.errors import StorageError

    partial = out.with_name(f".{out.name}.partial")
    try:
        if partial.exists():  # of a run that was killed
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        files = [file for file in partial.rglob("*") if file.is_file()]
        mode = (partial / "config.json").stat().st_mode
        for file in files:
            file.chmod(mode)  # safetensors makes its own readable by the owner alone
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        n_bytes = sum(file.stat().st_size for file in files)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        size = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
        raise StorageError(
            f"out: cannot write {out} (about {size:.1f} MiB): {error}; free space or choose another place"
        ) from error
    return n_bytes
