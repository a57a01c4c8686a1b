"""Names of language models, and what stands behind them: folder, GGUF file, installed package, or hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lmppl.errors import ModelError

__all__ = ["load"]


def load(name, *, tokenizer=None, dtype=None, device=None, download=False, gguf_file=None):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    path = Path(name).expanduser()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model, tokenizer or AutoTokenizer.from_pretrained(path)
