"""Qwen3.8-Flash-Next (Qwen4Exp): names, shapes and metadata.

Differences from `qwen3_5`: hyper-connections in place of every norm of a block, an indexer in full
attention, and on one layer a table of n-gram embeddings. Follows llama.cpp's
`conversion/qwen4exp.py` at b11434.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGUFValueType

from mtpforge.checkpoint.families import qwen3_5
from mtpforge.checkpoint.families.family import BF16, Family, Row, Source, View, unchanged
from mtpforge.checkpoint.families.qwen3_5 import convolution, matrix, norm
from mtpforge.checkpoint.hparams import Hparams
from mtpforge.errors import CheckpointError

CONSTANTS = ("layer_multipliers", "ngram_heads_offsets", "ngram_heads_vocab_sizes")
"""The integers that hash n-grams; the GGUF has them as metadata."""


def joined(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Join matrices side by side."""
    return [np.concatenate(arrays, axis=1)]


def rows_of(first: int, end: int) -> View:
    """Select rows of a matrix."""
    return lambda arrays: [arrays[0][first:end]]


def streams(hp: Hparams) -> int:
    """Return the width of the residual streams together."""
    return hp.count("hc_count") * hp.count("hidden_size")


def mixer(hp: Hparams, to: str, of: str) -> list[Row]:
    """A hyper-connection's norm, and the low-rank weights that mix the streams."""
    width, rank = streams(hp), hp.count("hc_lowrank")
    return [
        norm(f"{to}_norm.weight", f"{of}hc_norm.weight", width),
        matrix(f"{to}_down.weight", f"{of}input_mix_weight_down.weight", rank, width),
        matrix(f"{to}_up.weight", f"{of}input_mix_weight_up.weight", width, rank),
    ]


def hyper_connection(hp: Hparams, to: str, of: str) -> list[Row]:
    """A mixer, and the weights that write to the streams."""
    inject = matrix(
        f"{to}_inject.weight", f"{of}block_inject_weight.weight", hp.count("hc_count"), streams(hp)
    )
    return [*mixer(hp, to, of), inject]


def indexer(hp: Hparams, to: str, of: str) -> list[Row]:
    """The projections and norms that select keys; the checkpoint stores both projections as one."""
    hidden, dim = hp.count("hidden_size"), hp.count("indexer_head_dim")
    queries = hp.count("indexer_n_heads") * dim
    keys = hp.count("indexer_kv_heads", 1) * dim
    both = (f"{of}index_qk_proj.weight",), (queries + keys, hidden)
    q, k = Source(*both, rows_of(0, queries)), Source(*both, rows_of(queries, queries + keys))
    return [
        Row(f"{to}q_proj.weight", (queries, hidden), (q,)),
        Row(f"{to}k_proj.weight", (keys, hidden), (k,)),
        norm(f"{to}q_norm.weight", f"{of}q_layernorm.weight", dim),
        norm(f"{to}k_norm.weight", f"{of}k_layernorm.weight", dim),
    ]


def sparse_attention(hp: Hparams, to: str, of: str) -> list[Row]:
    """Full attention over the keys that the indexer selects."""
    index = indexer(hp, f"{to}indexer.", f"{of}self_attn.indexer.")
    return qwen3_5.full_attention(hp, to, of) + index


def block(hp: Hparams, to: str, of: str, attend: qwen3_5.Part) -> list[Row]:
    """One block: two hyper-connections, attention and experts."""
    return [
        *hyper_connection(hp, f"{to}hc_attn", f"{of}attn_hyper_connection."),
        *hyper_connection(hp, f"{to}hc_ffn", f"{of}mlp_hyper_connection."),
        *attend(hp, to, of),
        *qwen3_5.expert_mlp(hp, to, of),
    ]


def ngrams(hp: Hparams, to: str, of: str) -> list[Row]:
    """The n-gram embeddings of a layer: the table, which is stored in parts, and what reads it."""
    hidden, width, kernel = hp.count("hidden_size"), streams(hp), hp.count("ple_conv_kernel_size")
    parts = hp.count("split_ngram_parts")
    rows, dim = table_rows(hp), hp.count("ple_embed_dim") // heads(hp)
    names = tuple(f"{of}ple_embedding.ngram_embedding.shard_{i}.weight" for i in range(parts))
    conv1d = convolution(f"{of}conv1d.weight", width, kernel=kernel, view=unchanged)
    return [
        Row("per_layer_token_embd.weight", (rows, dim), (Source(names, (rows // parts, dim)),)),
        matrix(f"{to}ple_key.weight", f"{of}key_proj.weight", width, hidden),
        matrix(f"{to}ple_value.weight", f"{of}value_proj.weight", hidden, hidden),
        *(norm(f"{to}ple_{n}.weight", f"{of}{n}.weight", width) for n in _NGRAM_NORMS),
        Row(f"{to}ple_conv1d.weight", (width, kernel), conv1d, BF16),
    ]


_NGRAM_NORMS = ("norm_key", "norm_query", "norm_conv")


def heads(hp: Hparams) -> int:
    """Return the number of hashes, one for each size of n-gram and head."""
    return (hp.count("ngram_size") - 1) * hp.count("heads_per_ngram")


def table_rows(hp: Hparams) -> int:
    """Return the rows of the n-gram table: a prime for each hash, padded. Raises CheckpointError.

    The primes are the first from `ngram_vocab_size_base` on.
    """
    found = primes(hp.count("ngram_vocab_size_base"))
    rows = sum(next(found) for _ in range(heads(hp)))
    multiple = hp.count("make_ngram_vocab_size_divisible_by", 128)
    rows = -(-rows // multiple) * multiple
    if rows % hp.count("split_ngram_parts"):
        raise CheckpointError(
            f"config.json: a table of {rows} n-grams cannot be stored in "
            f"{hp.count('split_ngram_parts')} parts (split_ngram_parts)"
        )
    return rows


def primes(first: int) -> Iterator[int]:
    """Yield the primes from `first` on."""
    number = max(first, 2)
    while True:
        if all(number % divisor for divisor in range(2, math.isqrt(number) + 1)):
            yield number
        number += 1


def ngram_layers(hp: Hparams) -> list[int]:
    """Return the layers with n-gram embeddings, counted from 0. Raises CheckpointError."""
    given = hp.get("ple_layer_ids", [])
    layers = hp.count("num_hidden_layers")
    if not isinstance(given, list) or any(type(i) is not int or i not in range(1, layers + 1)
                                          for i in given):  # fmt: skip
        raise CheckpointError(
            f"config.json: ple_layer_ids must be layers from 1 to {layers}, not {given!r}"
        )
    if len(given) > 1:
        raise CheckpointError(
            f"config.json: ple_layer_ids has {len(given)} layers: llama.cpp supports one"
        )
    return [i - 1 for i in given]


def trunk(hp: Hparams) -> list[Row]:
    """Return embeddings, blocks, the mixer of the streams and, unless tied, the output matrix."""
    if hp.flag("attention_bias"):
        raise CheckpointError(
            "config.json: attention_bias is true, which llama.cpp does not support"
        )
    hidden, vocabulary = hp.count("hidden_size"), hp.count("vocab_size")
    rows = [matrix("token_embd.weight", "model.embed_tokens.weight", vocabulary, hidden)]
    for i, kind in enumerate(qwen3_5.layer_types(hp)):
        linear = kind == "linear_attention"
        attend = qwen3_5.linear_attention if linear else sparse_attention
        rows += block(hp, f"blk.{i}.", f"model.layers.{i}.", attend)
    for i in ngram_layers(hp):
        rows += ngrams(hp, f"blk.{i}.", f"model.layers.{i}.ple.")
    rows += mixer(hp, "output_hc", "model.hyper_connection_mixer.")
    if not hp.flag("tie_word_embeddings"):
        rows.append(matrix("output.weight", "lm_head.weight", vocabulary, hidden))
    return rows


def head(hp: Hparams) -> list[Row]:
    """Return block N. One matrix takes the embedding and each stream of the hidden state."""
    hidden = hp.count("hidden_size")
    to = f"blk.{hp.count('num_hidden_layers')}."
    fused = Source(("mtp.fc_embedding.weight", "mtp.fc_hidden.weight"), (hidden, hidden), joined)
    return [
        *block(hp, to, "mtp.layers.0.", sparse_attention),
        Row(f"{to}nextn.eh_proj.weight", (hidden, 2 * hidden), (fused,)),
        norm(f"{to}nextn.enorm.weight", "mtp.pre_fc_norm_embedding.weight", hidden),
        norm(f"{to}nextn.hnorm.weight", "mtp.pre_fc_norm_hidden.weight", streams(hp)),
        *mixer(hp, f"{to}nextn.hc_head", "mtp.hyper_connection_mixer."),
    ]


def describe(writer: GGUFWriter, hp: Hparams, head_blocks: int) -> None:
    """Write Qwen3.5's metadata, and those of hyper-connections, indexer and n-grams."""
    qwen3_5.describe(writer, hp, head_blocks)
    arch = writer.arch
    writer.add_uint32(f"{arch}.hyper_connection.count", hp.count("hc_count"))
    writer.add_uint32(f"{arch}.hyper_connection.low_rank", hp.count("hc_lowrank"))
    writer.add_indexer_head_count(hp.count("indexer_n_heads"))
    writer.add_indexer_key_length(hp.count("indexer_head_dim"))
    writer.add_indexer_top_k(hp.count("indexer_budget"))
    ratio = hp.count("indexer_compress_ratio")
    full = [kind == "full_attention" for kind in qwen3_5.layer_types(hp)] + [True] * head_blocks
    writer.add_array(f"{arch}.attention.compress_ratios", [ratio * each for each in full])
    if layers := ngram_layers(hp):
        _describe_ngrams(writer, hp, layers)


def _describe_ngrams(writer: GGUFWriter, hp: Hparams, layers: list[int]) -> None:
    key = f"{writer.arch}.ple."
    writer.add_array(f"{key}layers", layers)
    writer.add_uint32(f"{key}ngram_size", hp.count("ngram_size"))
    writer.add_uint32(f"{key}heads_per_ngram", hp.count("heads_per_ngram"))
    writer.add_uint32(f"{key}conv_kernel", hp.count("ple_conv_kernel_size"))
    writer.add_uint32(f"{key}eos_token_id", _last(hp.get("eos_token_id"), "eos_token_id"))
    if (image := hp.get("image_token_id")) is not None:
        writer.add_uint32(f"{key}image_token_id", _last(image, "image_token_id"))
    writer.add_embedding_length_per_layer_input(hp.count("ple_embed_dim") // heads(hp))
    names = ("layer_multipliers", "head_offsets", "head_vocab_sizes")
    for constant, name in zip(CONSTANTS, names, strict=True):
        if (numbers := hp.get(constant)) is not None:  # unknown without the tensors' values
            kinds = GGUFValueType.ARRAY, GGUFValueType.UINT64
            writer.add_key_value(f"{key}{name}", numbers, *kinds)


def _last(value: Any, key: str) -> int:
    """Return a token, or the last of a list of them."""
    token = value[-1] if isinstance(value, list) and value else value
    if type(token) is not int or not 0 <= token < 1 << 31:
        raise CheckpointError(f"config.json: {key} must be a token, not {value!r}")
    return token


MOE = Family(
    gguf_architecture="qwen4exp",
    huggingface_architectures=("Qwen4ExpForConditionalGeneration", "Qwen4ExpForCausalLM"),
    trunk=trunk,
    head=head,
    describe=describe,
    ignored=(*qwen3_5.VISION, *qwen3_5.OTHER_VISION),
    constants=CONSTANTS,
    without_trunk={"ple_layer_ids": []},
)
