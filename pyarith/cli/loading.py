"""A model and its tokenizer from a folder or a hub name, with a clear word where that fails."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarith.errors import InputError, NotAvailableError, UnsupportedModelError, check

if TYPE_CHECKING:
    import torch

DTYPES = {
    **{"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"},
    **{"float32": "float32", "bfloat16": "bfloat16", "float16": "float16", "float64": "float64"},
}
DEMO = "demo"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SECONDS = 10  # to wait for the hub's answer


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, its tokenizer, and the commit it came from where that is known."""

    model: Any
    tokenizer: Any
    revision: str | None


def load(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    stream: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Loaded:
    """Load ``name``: a folder if there is one, "demo" for the shipped model, else a name on the Hugging Face hub or in
    its local cache.

    Args:
        name: path or hub name.
        dtype: a key of ``DTYPES``, or "auto" = as stored (fp16 becomes fp32 on a CPU, where fp16 is hopelessly slow).
        device: "auto" = cuda where there is one, else cpu.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run Python code that comes with the model.
        stream: leave the weights in their files until they are computed with (``stream_checkpoint``); a hub model's
            files are fetched whole first.
        note: called with remarks for the user.
    Raises:
        InputError: no such folder or model, unknown dtype or device, a broken or incomplete checkpoint.
        NotAvailableError: neither in the cache nor reachable.
        UnsupportedModelError: a family that is not described; found before any weights are fetched.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from pyarith.models.streaming import stream_checkpoint

    known = ", ".join(["auto", *DTYPES])
    check(dtype == "auto" or dtype in DTYPES, f"dtype: expected one of {known}, got {dtype!r}")
    place = find_device(device)
    name = _demo_folder(name)
    where, local, commit = _find(name, revision, note)
    source: dict[str, Any] = {"local_files_only": local, "trust_remote_code": trust_remote_code}
    source |= {} if revision is None or Path(where).is_dir() else {"revision": revision}
    hint = "" if trust_remote_code else "; a model that comes with its own code needs --trust-remote-code"
    config = _attempt(f"MODEL: cannot read the config of {name!r}", AutoConfig.from_pretrained, where, hint, source)
    _check_family(config)
    what = f"MODEL: cannot load the tokenizer of {name!r}"
    tokenizer = _attempt(what, AutoTokenizer.from_pretrained, where, hint, source)
    if stream:
        folder = where if Path(where).is_dir() else _fetch(name, revision, local)
        return Loaded(stream_checkpoint(folder, device=place, dtype=_torch_dtype(dtype)), tokenizer, commit)
    wanted = {"dtype": DTYPES.get(dtype, "auto"), "output_loading_info": True, **source}
    quantised = getattr(config, "quantization_config", None) is not None
    wanted |= {"device_map": {"": str(place)}} if quantised else {}  # transformers moves and casts others afterwards
    what = f"MODEL: cannot load the weights of {name!r}"
    model, info = _attempt(what, AutoModelForCausalLM.from_pretrained, where, hint, wanted)
    broken = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    check(
        not broken,
        f"MODEL: expected a complete checkpoint, got {name!r} without fitting values for {len(broken)} tensors "
        f"({', '.join(broken[:3])}), which would be random",
    )
    if quantised:
        return Loaded(model.eval(), tokenizer, commit)
    if dtype == "auto" and place.type == "cpu" and str(model.dtype) == "torch.float16":
        note("stored in fp16, which CPUs compute very slowly: loaded in fp32 (--dtype fp16 keeps it)")
        model = model.float()
    return Loaded(model.to(place).eval(), tokenizer, commit)


def _torch_dtype(dtype: str) -> torch.dtype | None:
    import torch

    return None if dtype == "auto" else getattr(torch, DTYPES[dtype])


def _fetch(name: str, revision: str | None, local: bool) -> str:
    """A folder with the files of a hub model."""
    from huggingface_hub import snapshot_download

    options = {"revision": revision, "local_files_only": local, "allow_patterns": ["*.json", "*.safetensors"]}
    folder: str = _attempt(f"MODEL: cannot fetch the files of {name!r}", snapshot_download, name, "", options)
    return folder


def load_config(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Any:
    """The config of ``name``: a config.json or a folder with one, "demo", or a hub name. Weights are not looked for.

    Raises:
        Whatever ``load`` raises about a config.
    """
    from transformers import AutoConfig

    name = _demo_folder(name)
    where, local = (name, True) if Path(name).is_file() else _find(name, revision, note)[:2]
    source: dict[str, Any] = {"local_files_only": local, "trust_remote_code": trust_remote_code}
    source |= {} if revision is None or local else {"revision": revision}
    hint = "" if trust_remote_code else "; a model that comes with its own code needs --trust-remote-code"
    config = _attempt(f"MODEL: cannot read the config of {name!r}", AutoConfig.from_pretrained, where, hint, source)
    _check_family(config)
    return config


def find_device(device: str) -> torch.device:
    """The device of this name; "auto" = cuda where there is one, else cpu.

    Raises:
        InputError: no such device, or not here.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise InputError(f"device: expected auto, cpu, cuda, cuda:0, ... or mps, got {device!r}") from None
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise InputError(f"device: expected one that torch sees, got {device!r} with {count} CUDA devices; try cpu")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device: expected one that torch sees, got 'mps', which is not available; try cpu")
    return found


def _demo_folder(name: str) -> str:
    """The folder of the shipped model for "demo", any other name as it is."""
    if name != DEMO or Path(name).exists():
        return name
    from pyarith.demo import MODEL_DIR

    return str(MODEL_DIR)


def _find(name: str, revision: str | None, note: Callable[[str], None]) -> tuple[str, bool, str | None]:
    """Where to load from, whether files on this machine only, and the hub commit."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        known = (folder / "config.json").is_file()
        check(
            known or not (folder / "adapter_config.json").is_file(),
            f"MODEL: expected a model, got {name!r} with an adapter of PEFT alone; save its base with the adapter "
            "merged (merge_and_unload), or give the PeftModel to pa.discover in Python",
        )
        check(known, f"MODEL: expected a folder with config.json, got {name!r} without one")
        return str(folder), True, None
    check(not folder.exists(), f"MODEL: expected a folder or a hub name, got the file {name!r}")
    if not _HUB_NAME.fullmatch(name) or name in (".", ".."):
        raise InputError(f"MODEL: no folder {name!r}, and it is no hub name (NAME or OWNER/NAME)")
    return _find_on_hub(name, revision, note)


def _find_on_hub(name: str, revision: str | None, note: Callable[[str], None]) -> tuple[str, bool, str | None]:
    """One question to the hub, since a failing download would be tried again for half a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError as error:
        raise InputError(f"MODEL: no folder {name!r}, and it is no hub name ({error})") from None
    try:
        return name, False, HfApi().model_info(name, revision=revision, timeout=_SECONDS).sha
    except RevisionNotFoundError:
        raise InputError(f"revision: {name!r} on the Hugging Face hub has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"MODEL: neither a folder {name!r} here nor a model of that name on the Hugging Face hub "
            "(a private or gated one needs `hf auth login` first)"
        ) from None
    except Exception as error:  # which class means "no network" depends on the HTTP library in use
        reason = " ".join(str(error).split()) or type(error).__name__
        kept = "cannot be asked" if isinstance(error, HfHubHTTPError) else "cannot be reached"
        if not isinstance(cached, str):
            raise NotAvailableError(
                f"MODEL: {name!r} is no folder here and not in the local Hugging Face cache, and the hub {kept} "
                f"({reason}). Give the path of a local checkpoint, or run once with network"
            ) from None
        note(f"the hub {kept} ({reason}): using the copy in the local cache")
        return name, True, Path(cached).parent.name


def _attempt(what: str, load: Callable[..., Any], where: str, hint: str, options: dict[str, Any]) -> Any:
    """``load(where, **options)``; what third-party code raises about a checkpoint becomes one kind of error."""
    try:
        return load(where, **options)
    except Exception as error:  # which classes they raise differs by library and release
        text = " ".join(str(error).split())
        custom = "trust_remote_code" in text
        message = f"{what}: {text or type(error).__name__}"
        raise InputError(message[:600] + (hint if custom else "")) from error


def _check_family(config: Any) -> None:
    from pyarith.models.families import FAMILIES

    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"MODEL: family {config.model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))} "
            "(CONTRIBUTING.md: how to add a family)"
        )
