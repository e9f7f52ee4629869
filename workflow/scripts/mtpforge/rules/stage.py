"""The base of all stages: the wildcards of a job, and the model and variant that they name."""

from typing import Protocol

from mtpforge.errors import ConfigError
from mtpforge.rules.config import Config, Model
from mtpforge.rules.variant import Variant


class Wildcards(Protocol):
    """The wildcards of a job; each rule has some of them."""

    model: str
    variant: str
    base: str
    type: str
    part: str
    text: str
    repo: str
    revision: str
    stem: str
    kind: str
    name: str
    donor: str
    place: str
    file: str
    matrix: str
    method: str


class Stage:
    """Inputs and parameters of a stage's rules, as functions of a job's wildcards."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def model(self, wildcards: Wildcards) -> Model:
        """The model that the wildcards name."""
        return self.config.models[wildcards.model]

    def variant(self, wildcards: Wildcards) -> Variant:
        """The variant that they name. Raises ConfigError if its model does not have it."""
        return self.find(wildcards.model, wildcards.variant)

    def find(self, model: str, variant: str) -> Variant:
        """A variant of a model. Raises ConfigError if the model does not have it."""
        variants = self.config.models[model].variants
        if variant not in variants:
            raise ConfigError(f"config.yaml: models/{model}/variants has no {variant}")
        return variants[variant]

    def check_base(self, wildcards: Wildcards, variant: Variant | None = None) -> None:
        """Raise ConfigError for a file, of a variant or of none, with the name of another model."""
        model = self.model(wildcards)
        base = model.name_of(variant) if variant else model.base_name
        if wildcards.base != base:
            raise ConfigError(f"files of {model.key} are named {base}-*, not {wildcards.base}-*")
