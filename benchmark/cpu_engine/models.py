"""The models that are measured: the demo model, and one ten times its size.

Owns the larger one, built once in the user's cache folder. It must never download anything, nor
leave a half-built folder where a whole one is expected.
"""

import os
import shutil
import tempfile
from pathlib import Path

TINY, MEDIUM = "tiny", "medium"
MODELS = (TINY, MEDIUM)
MEDIUM_FOLDER = "cpu-benchmark-medium-v1"
MEDIUM_SEED = 20_260_102
FIRST_ORDINARY_TOKEN = 6
"""The tokenizer's special tokens come first."""


def ensure(model: str) -> Path:
    """Return a model's folder; build it first if it is missing.

    Args:
        model: ``tiny`` or ``medium``.

    Returns:
        A folder that SGLang and vLLM load.

    Raises:
        OSError: the cache folder cannot be written.
    """
    from econoserve import demo_model

    tiny = demo_model.ensure()
    if model == TINY:
        return tiny
    folder = tiny.parent / MEDIUM_FOLDER
    if not folder.exists():
        _build_beside(folder, tiny)
    return folder


def _build_beside(folder: Path, tiny: Path) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        _build(partial, tiny)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _build(folder: Path, tiny: Path) -> None:
    """57 million random weights behind the demo model's tokenizer."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = LlamaConfig(
        hidden_size=768,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=2048,
        vocab_size=len(tokenizer),
        max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(MEDIUM_SEED)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
