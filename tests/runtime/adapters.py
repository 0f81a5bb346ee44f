"""A worker with LoRA adapters: each request by itself, then all at once on a KV cache too small.

Run as a program in a process of its own: ``adapters.py OUTPUT.json FOLDER``, the latter for the
adapters, which are random.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from econoserve import Engine, demo_model

ADAPTERS = 4
MOST_PER_BATCH = 3
RANK = 4
REQUESTS = 20


def write_adapter(folder: Path, seed: int) -> Path:
    """Write an adapter for the demo model, strong enough to change what is generated."""
    model = demo_model.ensure()
    sizes = json.loads((model / "config.json").read_text())
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    values = hidden // heads * sizes["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, values),
        "mlp.down_proj": (sizes["intermediate_size"], hidden),
    }
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(sizes["num_hidden_layers"]):
        for name, (inputs, outputs) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{prefix}.lora_A.weight"] = (
                torch.randn(RANK, inputs, generator=generator) * 0.3
            )
            weights[f"{prefix}.lora_B.weight"] = (
                torch.randn(outputs, RANK, generator=generator) * 0.3
            )
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "target_modules": [name.split(".")[1] for name in shapes],
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def main():
    output, folder = map(Path, sys.argv[1:3])
    names = [f"adapter{number}" for number in range(ADAPTERS)]
    engine = Engine(
        model_path=str(demo_model.ensure()),
        device="cpu",
        dtype="float32",
        random_seed=1,
        max_total_tokens=600,
        disable_radix_cache=True,
        enable_lora=True,
        lora_paths={name: str(write_adapter(folder / name, i)) for i, name in enumerate(names)},
        max_loras_per_batch=MOST_PER_BATCH,
        econoserve_tfs=64,
        econoserve_parked_kvc=0.5,
        # It does not learn from one request what the next of its kind will be.
        econoserve_predictor="quantile",
        econoserve_kvc_risk=0.95,
        econoserve_rl_prior=2,
        econoserve_rl_quantile=0.02,
        econoserve_kvc_reserve=0.0,
        econoserve_host_kvc_gib=1.0,
        econoserve_host_gb_per_s=1000.0,
        econoserve_on_error="crash",
        econoserve_check_books=True,
    )
    prompts = [
        [7 + (i // 5 * 31 + j) % 400 for j in range(10 + i % 7 * 9)] for i in range(REQUESTS)
    ]
    adapters = [(None, *names)[i % (ADAPTERS + 1)] for i in range(REQUESTS)]
    sampling = [
        {"max_new_tokens": 20 + i * 13 % 80, "temperature": 0, "ignore_eos": True}
        for i in range(REQUESTS)
    ]
    alone = [
        engine.generate(input_ids=prompt, sampling_params=how, lora_path=adapter)
        for prompt, how, adapter in zip(prompts, sampling, adapters, strict=True)
    ]
    together = engine.generate(input_ids=prompts, sampling_params=sampling, lora_path=adapters)
    result = {
        "adapters": adapters,
        "alone": [answer["output_ids"] for answer in alone],
        "together": [answer["output_ids"] for answer in together],
        "state": engine.get_server_info()["internal_states"][0]["econoserve"],
    }
    output.write_text(json.dumps(result))
    engine.shutdown()


if __name__ == "__main__":
    main()
