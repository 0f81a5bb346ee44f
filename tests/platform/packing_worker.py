"""Greedy outputs before and after updates of the weights, for ``test_packing``.

Run as a program in a process of its own: ``packing_worker.py OUTPUT.json DIRECTORY``. A model with
changed weights is written to the directory.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sglang import Engine

from econoserve import demo_model


def changed_model(source: Path, target: Path) -> dict[str, torch.Tensor]:
    """Write a copy of a model with other weights.

    Returns:
        The changed weights by name.
    """
    shutil.copytree(source, target)
    generator = torch.Generator().manual_seed(4)
    changed = {}
    for file in sorted(target.glob("*.safetensors")):
        weights = load_file(file)
        for name, weight in sorted(weights.items()):
            noise = torch.randn(weight.shape, generator=generator)
            weights[name] = (weight.float() * (1 + noise / 4)).to(weight.dtype)
        save_file(weights, file, metadata={"format": "pt"})
        changed.update(weights)
    return changed


def engine_of(path: Path) -> Engine:
    return Engine(
        model_path=str(path),
        device="cpu",
        dtype="bfloat16",
        random_seed=1,
        max_total_tokens=4096,
        disable_radix_cache=True,
        decode_log_interval=1,
        log_level="info",
    )


def outputs(engine: Engine) -> list[list[int]]:
    """Of requests alone and of a batch."""
    rng = random.Random(3)
    prompts = [[rng.randrange(5, 4000) for _ in range(25)] for _ in range(8)]
    params = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}
    results = [engine.generate(input_ids=ids, sampling_params=params) for ids in prompts[:2]]
    results += engine.generate(input_ids=prompts, sampling_params=params)
    return [list(one["output_ids"]) for one in results]


def main() -> None:
    original = demo_model.ensure()
    changed = Path(sys.argv[2])
    tensors = changed_model(original, changed)
    results = {}
    engine = engine_of(original)
    results["original"] = outputs(engine)
    engine.begin_weight_update()
    done = engine.update_weights_from_tensor(list(tensors.items()))
    engine.end_weight_update()
    assert done[0], done
    results["updated from tensors"] = outputs(engine)
    done = engine.update_weights_from_disk(str(original))
    assert done[0], done
    results["updated from disk"] = outputs(engine)
    engine.shutdown()
    fresh = engine_of(changed)
    results["changed"] = outputs(fresh)
    fresh.shutdown()
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
