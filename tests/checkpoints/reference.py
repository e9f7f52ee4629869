"""Reference results: greedy decoding with one-token drafts, counted as in llama-server."""

from __future__ import annotations

import platform
from typing import Any

import tokenizers
import torch
import transformers
from model import TinyModel
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DynamicCache

N_PREDICT = 200


@torch.no_grad()
def greedy(model: TinyModel, prompt: list[int], n_predict: int) -> list[int]:
    """Return the most likely continuation, decoded token by token with a cache."""
    cache = DynamicCache(config=model.text.config)
    tokens = torch.tensor([prompt])
    out: list[int] = []
    while len(out) < n_predict:
        out.append(int(model.logits(model.trunk_states(tokens, cache)[0, -1]).argmax()))
        tokens = torch.tensor([[out[-1]]])
    return out


@torch.no_grad()
def draft_predictions(model: TinyModel, sequence: list[int]) -> tuple[list[int], Tensor, Tensor]:
    """Return the head's draft after each token of [T] `sequence`, and [T, V] logits of both.

    For every accepted position p, the head's cache in llama-server holds (token p, trunk state
    p - 1); rejected entries are removed before the next draft. One pass over the finished sequence
    therefore gives every draft.
    """
    tokens = torch.tensor([sequence])
    hidden = model.trunk_states(tokens)
    drafted = model.logits(model.draft_states(tokens, hidden))[0]
    return drafted.argmax(-1).tolist(), model.logits(hidden)[0], drafted


def count_drafts(generated: list[int], drafts: list[int]) -> tuple[int, int]:
    """Return (drafts, accepted) of a greedy run; `drafts[i]` follows `generated[i]`.

    The first token comes from the prompt. Each further step drafts and verifies one token: an
    accepted draft yields two tokens, a rejected one only the trunk's. With one token left to
    generate, llama-server does not draft.
    """
    made, n_drafted, n_accepted = 1, 0, 0
    while made < len(generated):
        if len(generated) - made < 2:
            made += 1
            continue
        n_drafted += 1
        right = drafts[made - 1] == generated[made]
        n_accepted += right
        made += 1 + right
    return n_drafted, n_accepted


def most_repeated(tokens: list[int], n: int = 8) -> int:
    """How often the most frequent n-gram occurs, which exposes loops."""
    counts: dict[tuple[int, ...], int] = {}
    for i in range(len(tokens) - n + 1):
        gram = tuple(tokens[i : i + n])
        counts[gram] = counts.get(gram, 0) + 1
    return max(counts.values())


def run_prompt(
    model: TinyModel, tokenizer: Tokenizer, prompt: str, n_predict: int = N_PREDICT
) -> dict[str, Any]:
    """One entry of reference.json."""
    ids = tokenizer.encode(prompt).ids
    generated = greedy(model, ids, n_predict)
    drafts, logits, draft_logits = draft_predictions(model, ids + generated)
    # Row i of the logits predicts token i + 1: the prompt's last row gives the first generated one.
    rows = slice(len(ids) - 1, len(ids) + n_predict - 1)
    margins = _margins(logits[rows])
    if logits[rows].argmax(-1).tolist() != generated:
        raise SystemExit(
            "decoding with a cache and in one pass disagree: a margin is too small for a reference"
        )
    drafted, accepted = count_drafts(generated, drafts[len(ids) :])
    return {
        "prompt": prompt,
        "prompt_tokens": ids,
        "n_predict": n_predict,
        "text": tokenizer.decode(generated, skip_special_tokens=False),
        "greedy_tokens": generated,
        "draft_tokens": drafts[len(ids) :],
        "drafts": drafted,
        "accepted": accepted,
        "acceptance": round(accepted / drafted, 4),
        # Gap to the second choice, in logits: rounding errors below it do not change the text.
        "smallest_margin": round(min(margins), 4),
        "smallest_draft_margin": round(
            min(_margins(draft_logits[len(ids) : len(ids) + n_predict])), 4
        ),
        "most_repeated_8gram": most_repeated(generated),
    }


def _margins(logits: Tensor) -> list[float]:
    """Return the gap between the best and the second-best logit for each row of [T, V]."""
    best = logits.topk(2, dim=-1).values
    return (best[:, 0] - best[:, 1]).tolist()


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }
