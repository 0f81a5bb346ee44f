"""Models of a real model's shape without its weights, made in seconds.

Owns the shapes. Those that are timed have no weights on disk: SGLang fills them with numbers that
do not matter. All have heads of 128 and four queries to a key, so that FlashInfer compiles one set
of kernels.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from econoserve import demo_model

DEMO = "demo"
SEED = 7
CONTEXT_TOKENS = 8192
HEAD_SIZE = 128
BYTES = {"float32": 4, "bfloat16": 2}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama.

    Attributes:
        layers: how many.
        hidden_size: width.
        heads: query heads of 128.
        kv_heads: key and value heads.
        intermediate_size: width of the feed-forward layers.
        vocab_size: tokens it knows.
        weights: whether it has weights of its own, or what SGLang fills in.
    """

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    intermediate_size: int
    vocab_size: int
    weights: bool


SHAPES = {
    "small": Shape(4, 512, 4, 1, 1024, demo_model.VOCAB_SIZE, weights=True),
    "1b": Shape(16, 2048, 16, 4, 8192, 128_256, weights=False),
    "8b": Shape(32, 4096, 32, 8, 14_336, 128_256, weights=False),
}
"""By name; ``demo`` is the demo model, which runs on a CPU."""


def ensure(name: str, folder: Path) -> Path:
    """Make a model's folder, if it is not there.

    Args:
        name: of ``SHAPES``, or ``demo``.
        folder: where models are kept.

    Returns:
        A folder that SGLang loads.

    Raises:
        ValueError: no model has that name.
    """
    if name == DEMO:
        return demo_model.ensure()
    if name not in SHAPES:
        raise ValueError(f"model {name!r}: give one of {', '.join((DEMO, *SHAPES))}")
    to = folder / name
    if not (to / "complete").exists():
        _make(SHAPES[name], to)
        (to / "complete").touch()
    return to


def load_format(name: str) -> str:
    """How SGLang loads a model.

    Args:
        name: of ``SHAPES``, or ``demo``.

    Returns:
        A value of ``--load-format``.
    """
    return "auto" if name == DEMO or SHAPES[name].weights else "dummy"


def memory(folder: Path, dtype: str) -> dict[str, int]:
    """What a model takes of a device's memory.

    Args:
        folder: a Llama's, with its ``config.json``.
        dtype: of its weights and its KVC.

    Returns:
        ``weights_bytes``, ``layers``, ``kv_heads``, ``head_dim``, ``bytes_per_value`` and
        ``context_tokens``.
    """
    config = json.loads((folder / "config.json").read_text())
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or width // heads
    attention = 2 * width * head_dim * (heads + kv_heads)
    matrices = layers * (attention + 3 * width * inner)
    norms = (2 * layers + 1) * width
    vocabularies = 1 if config.get("tie_word_embeddings") else 2
    values = matrices + norms + vocabularies * config["vocab_size"] * width
    bytes_per_value = BYTES[dtype]
    return {
        "weights_bytes": values * bytes_per_value,
        "layers": layers,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "bytes_per_value": bytes_per_value,
        "context_tokens": config["max_position_embeddings"],
    }


def _make(shape: Shape, to: Path) -> None:
    from transformers import LlamaConfig

    to.mkdir(parents=True, exist_ok=True)
    source = demo_model.ensure()
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, to / name)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=HEAD_SIZE,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        dtype="float32" if shape.weights else "bfloat16",
    )
    if shape.weights:
        _save_with_weights(config, to)
    else:
        config.save_pretrained(to)


def _save_with_weights(config: object, to: Path) -> None:
    """Random weights under which the next token depends on the whole context."""
    import torch
    from transformers import LlamaForCausalLM

    unit = 1 / math.sqrt(config.hidden_size)
    spread = {"embed_tokens": 1.0, "q_proj": 1.5 * unit, "k_proj": 1.5 * unit, "lm_head": 3 * unit}
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weights in sorted(model.named_parameters()):
            kind = next((kind for kind in spread if kind in name), None)
            if weights.dim() > 1:
                weights.normal_(0.0, spread.get(kind, unit), generator=generator)
    model.save_pretrained(to)
