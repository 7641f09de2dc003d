"""The small language model that comes with the package, and how it was made.

`model/` holds a Llama-architecture checkpoint in Hugging Face format with its tokenizer, `log.csv` and
`accuracy.json`; `python -m pyarith.demo.train` makes it again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyarith.errors import NotAvailableError, check

MODEL_DIR = Path(__file__).parent / "model"

__all__ = ["MODEL_DIR", "load_demo"]


def load_demo() -> tuple[Any, Any]:
    """Load the demo model as any other: `AutoModelForCausalLM` and `AutoTokenizer`, from files, no network.

    Returns:
        The model (fp32, CPU, evaluation mode) and its tokenizer.
    Raises:
        NotAvailableError: the package was installed without the model's files.
    """
    missing = [
        name for name in ("config.json", "model.safetensors", "tokenizer.json") if not (MODEL_DIR / name).exists()
    ]
    check(not missing, f"the demo model's files {missing} are not in {MODEL_DIR}; reinstall pyarith", NotAvailableError)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar for six megabytes is noise
    try:
        model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, local_files_only=True)
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.eval(), AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)
