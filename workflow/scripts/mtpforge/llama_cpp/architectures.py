"""Architectures that the pinned llama.cpp converts, and what it does with their heads.

The table was read from `conversion/*.py` and `src/models/*.cpp` of llama.cpp 0c1e57098.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from mtpforge.checkpoint.hparams import Hparams
from mtpforge.errors import CheckpointError
from mtpforge.gguf.reader import Gguf

LLAMA_CPP = "0c1e57098"

Change = Callable[[np.ndarray, Hparams], list[np.ndarray]]
"""A checkpoint's float32 values to those of the tensors that upstream makes of them."""


def plus_one(values: np.ndarray, hparams: Hparams) -> list[np.ndarray]:
    """A norm that is stored as w-1."""
    return [values + np.float32(1)]


def split_kv_b(values: np.ndarray, hparams: Hparams) -> list[np.ndarray]:
    """Latent attention's `kv_b_proj`, [heads * (nope + v), rank], as `k_b` [heads, rank, nope] and `v_b` [heads, v, rank]."""
    heads, nope, v = (
        hparams.count(key) for key in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim")
    )
    if values.shape[0] != heads * (nope + v):
        raise CheckpointError(
            f"kv_b_proj has {values.shape[0]} rows, config.json says {heads} * ({nope} + {v})"
        )
    by_head = values.reshape(heads, nope + v, -1)
    return [by_head[:, :nope].transpose(0, 2, 1), by_head[:, nope:]]


def interleaved(heads: str) -> Change:
    """Rotary halves of each head's rows interleaved, as Llama's queries and keys; `heads` is the key that counts the heads."""

    def change(values: np.ndarray, hparams: Hparams) -> list[np.ndarray]:
        count = hparams.count(heads)
        if values.shape[0] % (2 * count):
            raise CheckpointError(
                f"a projection of {values.shape[0]} rows does not divide into {count} heads ({heads})"
            )
        return [values.reshape(count, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)]

    return change


@dataclass(frozen=True)
class Architecture:
    """What the pinned llama.cpp does with the head of a Hugging Face architecture."""

    gguf: str
    prefix: str = ""
    """With which the names of the head's tensors begin; empty where it is the layers from `num_hidden_layers` on."""
    layers: int = 1
    """How many numbered layers of the checkpoint make one block of the GGUF."""
    blocks: int | None = None
    """What upstream takes for granted; None where `num_nextn_predict_layers` says it."""
    splits: bool = True
    """Whether upstream can leave the head out (--no-mtp) or write it alone (--mtp)."""
    drafts: bool = True
    """Whether llama-server can draft with it."""
    needs: str = ""
    """A tensor without which, in each block of the head, it cannot."""
    ranked: str = ""
    """Ending of a fused projection of which, in FP8, each rank of a cluster quantized its own rows."""
    changes: Mapping[str, Change] = field(default_factory=dict)
    """Ending of a tensor's name -> what upstream does to its values."""
    models: str = ""
    """A model that has it, if its name does not say so."""


_LATENT = {"kv_b_proj.weight": split_kv_b}
_MIMO = Architecture(
    "mimo2", prefix="model.mtp.", blocks=3, needs="attn_qkv.weight", ranked="qkv_proj.weight"
)
_LLAMA = {
    "q_proj.weight": interleaved("num_attention_heads"),
    "k_proj.weight": interleaved("num_key_value_heads"),
}

ARCHITECTURES: dict[str, Architecture] = {
    "Glm4MoeForCausalLM": Architecture("glm4moe", models="GLM-4.5"),
    "Glm4MoeLiteForCausalLM": Architecture("deepseek2", changes=_LATENT, models="GLM-4.7-Flash"),
    "GlmMoeDsaForCausalLM": Architecture("glm-dsa", changes=_LATENT, models="GLM-5.2"),
    "DeepseekV32ForCausalLM": Architecture("deepseek32", changes=_LATENT),
    "Step3p5ForCausalLM": Architecture("step35", changes={"norm.weight": plus_one}),
    "Step3p7ForConditionalGeneration": Architecture("step35", changes={"norm.weight": plus_one}),
    "NemotronHForCausalLM": Architecture(
        "nemotron_h_moe", prefix="mtp.", layers=2, changes=_LLAMA, models="MoE only"
    ),
    "MiMoV2FlashForCausalLM": _MIMO,
    "MiMoV2ForCausalLM": _MIMO,
    "HYV3ForCausalLM": Architecture("hy_v3"),
    "Cohere2MoeForCausalLM": Architecture("cohere2moe", splits=False),
    "BailingMoeV2ForCausalLM": Architecture("bailingmoe2", splits=False, drafts=False),
    "BailingMoeV3ForCausalLM": Architecture("bailingmoe3", changes=_LATENT),
    "ExaoneMoEForCausalLM": Architecture("exaone-moe", prefix="mtp.", splits=False, drafts=False),
    "ExaoneMoeForCausalLM": Architecture("exaone-moe", prefix="mtp.", splits=False, drafts=False),
}
"""Name in config.json -> what is known of it. Not here: heads that upstream drops (DeepSeek V3, ERNIE), tokenizers that need code
of the checkpoint (Kimi) or a newer transformers (GLM-5 Next), GLM-4.5V, with whose head and multimodal rotation llama-server
aborts, and architectures that we convert ourselves."""

VISION = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")
"""The architectures, our own, whose vision tower upstream can write and we can prove."""


def why_not_drafting(made: Gguf) -> str | None:
    """Why the pinned llama-server cannot draft with the head of a file; None where it can."""
    for entry in ARCHITECTURES.values():
        if entry.gguf == made.architecture:
            if not entry.drafts:
                return f"llama.cpp {LLAMA_CPP} loads {entry.gguf} but cannot draft with it"
            if entry.needs and any(
                f"blk.{block}.{entry.needs}" not in made.tensors for block in made.head_blocks
            ):
                return f"llama.cpp {LLAMA_CPP} loads {entry.gguf} but cannot draft with a head that has no {entry.needs}"
    return None
