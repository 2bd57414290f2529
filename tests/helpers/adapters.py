"""Random adapters as files."""

import torch
from safetensors.torch import save_file

from glide_ray.config.lora import AdapterConfig
from glide_ray.models.lora import DOWN, UP, add_adapters
from glide_ray.models.weights import load_model
from glide_ray.storage import fingerprint


def random_adapter(path, weights, seed=0, rank=4, base_sha256=None):
    """Write an adapter of every layer of the model in the file `weights`; returns its path.

    Its effect is strong, so that no picture with it is the one without it. `base_sha256`: another
    than that of `weights`.
    """
    model, config = load_model(weights)
    torch.manual_seed(seed)
    add_adapters(model, rank, float(rank))
    tensors = {
        name: 0.1 * torch.randn_like(one) if name.endswith(UP) else one.clone()
        for name, one in model.state_dict().items()
        if name.endswith((DOWN, UP))
    }
    about = AdapterConfig(
        base=config.name,
        base_sha256=base_sha256 or fingerprint(weights),
        role=config.role,
        rank=rank,
        alpha=rank,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"adapter": about.model_dump_json()})
    return path
