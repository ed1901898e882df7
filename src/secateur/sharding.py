"""`--shard`: weights of the decoder layers spread over the ranks (FSDP2), for models that one device cannot hold.

Each rank holds a part of every layer and gathers a layer when it is needed. All weights are frozen, so nothing but
them is sent. Rank 0 has the whole model in memory, where other stages need it, and deals it out; the others read
nothing but its configuration. Embeddings, the last norm and the output head are on every rank.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from secateur.config import Config
from secateur.families import build
from secateur.load import load_config_of
from secateur.ranks import Ranks


def sharded(
    ranks: Ranks, c: Config, device: torch.device, whole: tuple[PreTrainedModel, str] | None = None
) -> PreTrainedModel:
    """The model of a run to learn gates of on all ranks, who call this at once. Rank 0 gives the `whole` model, and
    where its decoder layers lie."""
    sources: dict[str, torch.Tensor] = {}
    about: tuple[str, dict[str, torch.dtype]] = "", {}
    if whole is not None:
        sources = dict([*whole[0].named_parameters(), *whole[0].named_buffers()])
        about = whole[1], {name: p.dtype for name, p in sources.items()}
    layers, dtypes = ranks.handed(about)
    with torch.device("meta"):
        model = build(load_config_of(c.model, c.trust_remote_code), c.trust_remote_code)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    model.eval().requires_grad_(False)
    mesh = init_device_mesh(device.type, (ranks.count,))
    for layer in model.get_submodule(layers).children():
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    model.to_empty(device=device)
    model.tie_weights()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if name in sources:
            value.copy_(sources[name].data)
        if isinstance(tensor, DTensor):
            tensor.data.copy_(distribute_tensor(value, mesh, tensor.placements))  # of what rank 0 has
        else:
            dist.broadcast(value, 0)
            tensor.data.copy_(value)
    return model
