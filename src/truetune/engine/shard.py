"""A base whose layers are spread over ranks (FSDP2): each rank keeps a part, and has a layer whole while it runs.

Only the frozen weights of the layers are spread. What is trained stays whole on every rank, and so do embeddings, the
last norm and the head, which the loss reads outside the model's forward (engine/loss.py). So gradients, optimizer and
checkpoints are those of `replicate`, and a run may go on with either.

Source: torch.distributed.fsdp.fully_shard (torch 2.13). Inside a layer's forward and backward its weights are plain
tensors again, the same objects each time, so that fused layers read them as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from truetune.engine.memory import copy_from_file, free_at_once
from truetune.errors import UserError


def make_mesh(num_ranks: int) -> DeviceMesh:
    """Return the ranks as FSDP wants them; all of them call this together."""
    return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (num_ranks,))


def shard(model: Any, mesh: DeviceMesh) -> Any:
    """Spread the layers of `model` (transformers, with PEFT's LoRA) over all ranks and return it.

    No rank waits for another here, so that they can do it one after the other.

    Raises: UserError if the weights of the layers are trained themselves, or the model has no list of layers.
    """
    transformer = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner = transformer.base_model
    layers = getattr(inner, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise UserError("shard_no_layers", where="strategy", fix="shard_other", name=type(inner).__name__)
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    frozen = [parameter for parameter in layers.parameters() if not parameter.requires_grad]
    if len(trained) and not frozen:
        raise UserError("shard_all_trained", where="strategy", fix="shard_other")
    free_at_once()
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    around = {parameter for parameter in inner.parameters() if not isinstance(parameter, DTensor)}
    # The root has no weights of its own: it lets the layers fetch theirs one ahead.
    fully_shard(inner, mesh=mesh, ignored_params=around)
    copy_from_file(parameter for parameter in model.parameters() if not isinstance(parameter, DTensor))
    return model
