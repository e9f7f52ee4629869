#!/usr/bin/env python3
"""Train the embedded tiny checkpoints.

Usage: `python tests/checkpoints/train.py [NAME ...] --out tests/checkpoints`

Needs torch and transformers 5, unlike the rest of the repository. Everything is seeded: the same
versions on the same kind of machine give the same files. Each checkpoint is trained on one thread
in its own process: the matrices are too small for more threads, and the order of summation does
not depend on the number of cores.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from card import model_card
from corpus import Grammar, held_out_prompts
from export import round_weights, save_checkpoint
from model import TEXT_CONFIGS, TOKENS, TinyModel, checkpoint_config
from reference import N_PREDICT, run_prompt, versions
from tokenizers import Tokenizer
from torch import Tensor
from vocabulary import train_tokenizer

# In tokens: room for a prompt and 200 tokens of continuation; four chunks of linear attention.
SEQUENCE = 256


def batches(tokenizer: Tokenizer, seed: int, size: int, held_out: bool = False) -> Iterator[Tensor]:
    """Yield [size, SEQUENCE + 1] token batches, rows filled with documents and then cut."""
    end = [tokenizer.token_to_id("<|endoftext|>")]
    documents = Grammar(seed, held_out).documents()
    while True:
        rows = []
        for _ in range(size):
            row: list[int] = []
            while len(row) <= SEQUENCE:
                row += tokenizer.encode(next(documents)).ids + end
            rows.append(row[: SEQUENCE + 1])
        yield torch.tensor(rows)


def losses(model: TinyModel, batch: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the trunk's loss, the head's loss, the acceptance and the trunk's accuracy.

    The batch is [B, T + 1]; acceptance is the share of drafts that equal the trunk's choice.
    """
    tokens, targets = batch[:, :-1], batch[:, 1:].reshape(-1)
    hidden = model.trunk_states(tokens)
    logits = model.logits(hidden).flatten(0, 1)
    drafted = model.logits(model.draft_states(tokens, hidden)).flatten(0, 1)
    trunk = F.cross_entropy(logits, targets)
    # A draft is accepted if it equals the trunk's choice, whatever the text: so the head learns the
    # trunk's distribution as well as the next token.
    wanted = logits.detach().log_softmax(-1)
    imitation = F.kl_div(drafted.log_softmax(-1), wanted, log_target=True, reduction="batchmean")
    head = 0.5 * F.cross_entropy(drafted, targets) + 0.5 * imitation
    best = logits.argmax(-1)
    return (
        trunk,
        head,
        (drafted.argmax(-1) == best).float().mean(),
        (best == targets).float().mean(),
    )


def learning_rate(step: int, steps: int) -> float:
    """As a fraction of the peak: short warm-up, plateau, linear decay to 0 over the last half."""
    return min((step + 1) / 20, 1.0, 2.0 * (1.0 - step / steps))


def train(
    model: TinyModel,
    tokenizer: Tokenizer,
    name: str,
    steps: int,
    batch_size: int,
    peak: float,
    seed: int,
) -> None:
    """Train trunk and head together, in place."""
    matrices = [p for n, p in model.named_parameters() if p.ndim >= 2 and "visual" not in n]
    vectors = [p for n, p in model.named_parameters() if p.ndim < 2 and "visual" not in n]
    # Vectors are norms and rates of the recurrence. Weight decay would pull norms towards 0, where
    # a lost +1 goes unnoticed.
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.97),
    )
    balance = model.trunk.config.text_config.router_aux_loss_coef if model.is_moe else 0.0
    stream = batches(tokenizer, seed, batch_size)
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * learning_rate(step, steps)
        trunk, head, agreement, accuracy = losses(model, next(stream))
        loss = trunk + head + balance * model.balance_loss()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(matrices + vectors, 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(
                f"{name}: step {step:4d}/{steps}  trunk {trunk.item():.3f}  "
                f"head {head.item():.3f}  accuracy {accuracy.item():.3f}  "
                f"agreement {agreement.item():.3f}  {time.monotonic() - started:.0f} s",
                flush=True,
            )
        if not math.isfinite(loss.item()):
            raise SystemExit(f"the loss is not finite at step {step}: lower --peak")


def make_checkpoint(
    name: str, out: Path, steps: int, batch_size: int, peak: float, seed: int
) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    print(f"{name}: tokenizer", flush=True)
    tokenizer = train_tokenizer(itertools.islice(Grammar(seed).documents(), 3000), TOKENS)
    config = checkpoint_config(name, tokenizer)
    model = TinyModel(config, seed)
    print(
        f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} million weights",
        flush=True,
    )
    train(model, tokenizer, name, steps, batch_size, peak, seed + 1)
    round_weights(model)
    model.eval()
    with torch.no_grad():
        trunk, _, agreement, accuracy = losses(
            model, next(batches(tokenizer, seed + 2, 16, held_out=True))
        )
    print(
        f"{name}: held out: loss {trunk:.3f}, accuracy {accuracy:.3f}, agreement {agreement:.3f}",
        flush=True,
    )
    prompts = {
        kind: run_prompt(model, tokenizer, text) for kind, text in held_out_prompts().items()
    }
    for kind, entry in prompts.items():
        print(
            f"{name}: {kind}: {entry['accepted']} of {entry['drafts']} drafts, "
            f"margins {entry['smallest_margin']} and {entry['smallest_draft_margin']}, "
            f"most repeated 8-gram {entry['most_repeated_8gram']}",
            flush=True,
        )
    reference = {
        "n_predict": N_PREDICT,
        "prompts": prompts,
        "held_out": {
            "accuracy": round(accuracy.item(), 4),
            "agreement": round(agreement.item(), 4),
        },
        "training": {
            "steps": steps,
            "batch": batch_size,
            "sequence": SEQUENCE,
            "seed": seed,
            "peak": peak,
        },
        "versions": versions(),
    }
    save_checkpoint(
        model, tokenizer, config, reference, model_card(name, config, reference), out / name
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"any of {', '.join(TEXT_CONFIGS)}; all by default",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="parent folder of the checkpoints"
    )
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--peak", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    for name in args.names:
        if name not in TEXT_CONFIGS:
            parser.error(f"unknown checkpoint {name!r}: choose from {', '.join(TEXT_CONFIGS)}")
    names = list(dict.fromkeys(args.names)) or list(TEXT_CONFIGS)
    # Fresh interpreters: a fork would inherit torch's thread pools and generator.
    with ProcessPoolExecutor(len(names), mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit(
                make_checkpoint, name, args.out, args.steps, args.batch, args.peak, args.seed
            )
            for name in names
        ]
        for job in jobs:
            job.result()
    return 0


if __name__ == "__main__":
    sys.exit(main())
