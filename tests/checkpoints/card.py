"""The model card of a tiny checkpoint."""

from __future__ import annotations

from typing import Any


def model_card(name: str, config: dict[str, Any], reference: dict[str, Any]) -> str:
    text, training = config["text_config"], reference["training"]
    is_moe = "num_experts" in text
    kind, experts = "dense", ""
    if is_moe:
        kind = f"{text['num_experts']} experts of which {text['num_experts_per_tok']} run, and a shared one"
        experts = "The trunk's experts are fused tensors and the head's one tensor each, as in Qwen3.5-35B-A3B.\n"
    rows = "\n".join(
        f"| {key} | {entry['drafts']} | {entry['accepted']} | {entry['acceptance']:.2f} |"
        for key, entry in reference["prompts"].items()
    )
    steps, millions = (
        training["steps"],
        training["steps"] * training["batch"] * training["sequence"] / 1e6,
    )
    agreement = 100 * reference["held_out"]["agreement"]
    return f"""\
---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
tags:
- mtp
- speculative-decoding
- test-fixture
- {config["model_type"]}
---

# {name}

A very small language model ({kind}; {text["num_hidden_layers"]} layers of width {text["hidden_size"]}) in the layout
of a Qwen3.5 checkpoint, with a draft head (`mtp.*`) that was really trained. It exists to test converters and runtimes:
it is small enough to lie in a repository, and its drafts are accepted often enough that a broken head shows at once.
It is not derived from any other model, and knows nothing but its grammar.
{experts}
## Training

Trunk and head were trained together from random weights for {steps} steps ({millions:.2f} million tokens) in float32 on
text that a seeded grammar generates: day-by-day tales, small Python-like modules, records in four notations, and phrase
books in several scripts. No text of anybody else was used. The weights were then rounded to BF16. The vision tower is
random and untrained: it is there because real checkpoints have one. `train.py`, beside this folder, makes it all again.

## Drafts

Greedy decoding of {reference["n_predict"]} tokens with one draft token a step, on prompts whose pairs of names and
whose numbers are not in the training text; float32 arithmetic on the rounded weights. `reference.json` has the tokens.

| prompt | drafts | accepted | share |
| --- | --- | --- | --- |
{rows}

On held-out text in general the head agrees with the trunk's first choice on {agreement:.0f}% of the tokens.
"""
