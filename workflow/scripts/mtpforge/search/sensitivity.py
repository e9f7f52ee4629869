"""The sensitivity of each unit: how much KL divergence a relative squared error of one would cause.

The loss of a unit at a type is its sensitivity times its error at that type.
"""

from collections.abc import Callable, Mapping

from mtpforge.errors import ConfigError
from mtpforge.search import groups
from mtpforge.search.groups import Groups

LEAST = 1e-6
"""KL divergence in nats below which llama-perplexity prints zero."""
ROUNDS = 100
"""How often numbers of classes and layers are fitted in turn."""

# Sensitivity of a tensor relative to `ffn_up`, by the class of its unit: see docs/recipes.md.
PRIOR = {
    "token_embd.weight": 9.0,
    "output.weight": 40.0,
    "attn_q.weight": 0.25,
    "attn_k.weight": 0.25,
    "attn_v.weight": 1.2,
    "attn_output.weight": 0.7,
    "attn_qkv.weight": 0.9,
    "attn_gate.weight": 0.5,
    "ssm_out.weight": 0.9,
    "ssm_alpha.weight": 0.1,
    "ssm_beta.weight": 0.1,
    "ffn_gate_up.weight": 0.9,
    "ffn_down.weight": 1.05,
    "ffn_gate_up_exps.weight": 0.9,
    "ffn_down_exps.weight": 1.05,
    "ffn_gate_up_shexp.weight": 0.9,
    "ffn_down_shexp.weight": 1.05,
}
TIED = 52.0
"""The same of `token_embd` if it is the output too."""
_OTHER = 1.0


def by_prior(units: Groups) -> dict[str, float]:
    """Sensitivities of units by the table, relative to `ffn_up`."""
    found = {unit: PRIOR.get(groups.class_of(unit), _OTHER) for unit in units}
    if "output.weight" not in found and "token_embd.weight" in found:
        found["token_embd.weight"] = TIED
    return found


def by_tensor(
    units: Groups, errors: Mapping[str, float], moved: Mapping[str, float]
) -> dict[str, float]:
    """Sensitivities of units from the KL divergence that each causes at the probe's type.

    `errors` are those of the tensors at that type. Raises ConfigError for a unit without a result.
    """
    return {
        unit: _result(moved, unit) / (sum(_error(errors, name) for name in names) or LEAST)
        for unit, names in units.items()
    }


def by_class_and_layer(
    units: Groups, errors: Mapping[str, float], moved: Mapping[str, float]
) -> dict[str, float]:
    """The same from the results of classes and of layers.

    A unit's sensitivity is the product of one number for its class and one for its layer, which are
    fitted to the results in turn.
    """
    classes, layers = _by(units, groups.class_of), _by(units, groups.layer_of)
    outside = layers.pop("", [])
    in_class = {name: _result(moved, name) for name in classes}
    in_layer = {name: _result(moved, name) for name in layers}
    of_blocks = sum(in_class.values()) - sum(in_class[groups.class_of(name)] for name in outside)
    scale = of_blocks / (sum(in_layer.values()) or 1)
    by_class, by_layer = dict.fromkeys(classes, 1.0), dict.fromkeys(layers, 1.0) | {"": 1.0}
    for _ in range(ROUNDS):
        for key, names in classes.items():
            weights = (by_layer[groups.layer_of(name)] * _error(errors, name) for name in names)
            by_class[key] = in_class[key] / (sum(weights) or LEAST)
        for key, names in layers.items():
            weights = (by_class[groups.class_of(name)] * _error(errors, name) for name in names)
            by_layer[key] = scale * in_layer[key] / (sum(weights) or LEAST)
    return {
        unit: by_class[groups.class_of(unit)] * by_layer[groups.layer_of(unit)] for unit in units
    }


def _by(units: Groups, key: Callable[[str], str]) -> Groups:
    """The tensors of all units with the same key."""
    found: Groups = {}
    for unit, names in units.items():
        found.setdefault(key(unit), []).extend(names)
    return found


def _result(moved: Mapping[str, float], group: str) -> float:
    if group not in moved:
        raise ConfigError(f"no sensitivity of {group}: they are of another model: measure again")
    return max(moved[group], LEAST)


def _error(errors: Mapping[str, float], name: str) -> float:
    """A tensor's error at the probe's type. Raises ConfigError if there is none."""
    if name not in errors:
        raise ConfigError(f"no error of {name}: they are of another model: measure again")
    return errors[name]
