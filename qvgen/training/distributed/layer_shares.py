"""The layers of a start that processes share out, and the files by which rank 0 gets what the others made of theirs.

    RUN_DIR/start_layers/shares.json         who sets up which layers, and where their statistics lie
    RUN_DIR/start_layers/NAME.claim          somebody has begun with this layer
    RUN_DIR/start_layers/NAME.safetensors    a layer as it was set up: its form, its tensors

A share is a proposal. Each process claims its layers one by one, and rank 0, when its own are done, claims what nobody has
begun: it never waits for a process that is late, only for layers that somebody works on.

A layer's weight is in its file only where the method changed it: rank 0 has the others, or reads them where the model's are.
Each file is whole or not there, and goes once rank 0 has read it, so that the disk never holds the model twice.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qvgen.initializers.base import Need
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.layer_form import LayerForm
from qvgen.run_directory import atomic_write
from qvgen.training.checkpoint.replaced_folder import remove

SHARES_DIRECTORY = "start_layers"
"""In the run's folder, while a start is made."""

_FORM = "form"
_OF_THE_MODEL = ("weight", "bias")


def balanced_shares(costs: Mapping[str, int], count: int) -> list[list[str]]:
    """Share out named things over processes: the dearest first, each to the process that has least so far.

    Args:
        costs: Name -> cost, in any unit.
        count: Processes.

    Returns:
        The names of each process, in the mapping's order; the same for the same arguments everywhere. No process has more
        than another one by more than the dearest thing.

    Example:
        >>> balanced_shares({"a": 1, "b": 4, "c": 2, "d": 1}, 2)
        [['b'], ['a', 'c', 'd']]
    """
    place = {name: number for number, name in enumerate(costs)}
    loads = [(0, rank) for rank in range(count)]
    shares: list[list[str]] = [[] for _ in range(count)]
    for name in sorted(costs, key=lambda name: (-costs[name], place[name])):
        load, rank = heapq.heappop(loads)
        shares[rank].append(name)
        heapq.heappush(loads, (load + costs[name], rank))
    return [sorted(share, key=place.__getitem__) for share in shares]


def setup_costs(layers: Mapping[str, FakeQuantLinear], *, needs: Collection[Need]) -> dict[str, int]:
    """What setting up each layer costs, in products of numbers up to a factor that all layers have in common.

    Searching a grid and decomposing what it loses are passes over the weight [N, K]; a method that knows the second moment
    [K, K] of the inputs passes over it for each row.
    """
    inner = {name: layer.in_features if "second_moment" in needs else 1 for name, layer in layers.items()}
    return {name: layer.in_features * layer.out_features * inner[name] for name, layer in layers.items()}


def layer_file(folder: Path, name: str) -> Path:
    """The file of a layer."""
    return folder / f"{name}.safetensors"


def claim_layer(folder: Path, name: str) -> bool:
    """Whether a layer is this process's from now on; False where another one has it, or the start is made already."""
    try:
        (folder / f"{name}.claim").touch(exist_ok=False)
    except (FileExistsError, FileNotFoundError):
        return False
    return True


def tensors_of_the_model(layer: FakeQuantLinear) -> dict[str, Tensor]:
    """Copies of what a layer has from the model, to be compared with once it is set up."""
    return {name: value.clone() for name, value in layer.state_dict().items() if name in _OF_THE_MODEL}


def write_layer(folder: Path, name: str, layer: FakeQuantLinear, *, before: Mapping[str, Tensor]) -> None:
    """Write a layer that was set up.

    Args:
        folder: Where the run's shares lie.
        name: The layer's.
        layer: As the method left it.
        before: What :func:`tensors_of_the_model` gave before.
    """
    state = {key: value.detach().contiguous() for key, value in layer.state_dict().items()}
    changed = {key: value for key, value in state.items() if key not in before or not torch.equal(value, before[key])}
    metadata = {_FORM: json.dumps(LayerForm.of(layer).to_dict())}
    atomic_write(layer_file(folder, name), lambda temporary: save_file(changed, temporary, metadata=metadata))


def read_form(file: Path) -> LayerForm:
    """The form of a layer that was set up."""
    with safe_open(file, framework="pt") as content:
        return LayerForm.from_dict(json.loads(content.metadata()[_FORM]))


def read_layer_(layer: FakeQuantLinear, file: Path) -> None:
    """Bring a prepared layer to what another process made of it.

    Raises:
        ValueError: The file is of another layer.
    """
    form = read_form(file)
    with safe_open(file, framework="pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - no mapping
    if form != LayerForm.of(layer):
        form.declare_(layer)
    missing, unexpected = layer.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - set(_OF_THE_MODEL):
        raise ValueError(f"{file} is of another layer: it lacks {list(missing)} and holds {list(unexpected)}")


def write_shares(folder: Path, shares: Sequence[Sequence[str]], *, neighbours: int, statistics: Path | None) -> None:
    """Write what :func:`read_share` reads.

    Args:
        folder: Where the run's shares lie.
        shares: Names of layers by rank.
        neighbours: Processes of a host.
        statistics: Folder of the layers' statistics; None for a method without.
    """
    plain = {
        "shares": [list(names) for names in shares],
        "neighbours": neighbours,
        "statistics": None if statistics is None else str(statistics.absolute()),
    }
    atomic_write(folder / "shares.json", json.dumps(plain).encode())


def remove_shares(folder: Path) -> None:
    """Delete a run's shares, if there are any, so that a process that is late can claim no layer of them any more.

    The folder is renamed first. Deleted in its place, it could get the claim of a late process between its files and itself.
    """
    if folder.exists():
        remove(folder)


def read_share(folder: Path, *, rank: int) -> tuple[list[str], int, Path | None]:
    """The layers of a process, how many processes its host has, and where statistics lie."""
    plain = json.loads((folder / "shares.json").read_text(encoding="utf-8"))
    statistics = plain["statistics"]
    return plain["shares"][rank], plain["neighbours"], None if statistics is None else Path(statistics)
