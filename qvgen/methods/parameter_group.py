"""Groups of parameters as the QVGen recipe trains them.

Weights and the factors of Phi decay; scales, zero points, clips, biases and norms do not (a decayed scale would shrink
the grid itself). Clips have a learning rate of their own: they are logits, on another scale than weights.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from qvgen.config.schema.sections import OptimConfig


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Groups for the optimizer: named, in a fixed order, empty ones left out.

    Returns:
        Dicts of name, params, lr (peak), weight_decay.
    """
    groups: dict[str, list[nn.Parameter]] = {
        "weights": [],
        "phi": [],
        "scales": [],
        "clips": [],
        "biases_and_norms": [],
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        modules = set(name.split("."))
        if modules & {"weight_quantizer", "other_weight_quantizers"}:
            groups["scales"].append(parameter)
        elif modules & {"activation_quantizer", "other_activation_quantizers", "attention_product"}:
            groups["clips"].append(parameter)
        elif "phi" in modules:
            groups["phi"].append(parameter)
        else:
            groups["weights" if parameter.ndim > 1 else "biases_and_norms"].append(parameter)
    result = []
    for name, parameters in groups.items():
        if parameters:
            rate = optim.clip_learning_rate if name == "clips" else optim.learning_rate
            decay = optim.weight_decay if name in ("weights", "phi") else 0.0
            result.append({"name": name, "params": parameters, "lr": rate, "weight_decay": decay})
    return result
