"""Architectures that the pinned llama.cpp converts, and how it treats their heads.

The table follows `conversion/*.py` and `src/models/*.cpp` of llama.cpp b11434.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from mtpforge.checkpoint.hparams import Hparams
from mtpforge.errors import CheckpointError
from mtpforge.gguf.reader import Gguf
from mtpforge.llama_cpp.runtimes import PINNED

Change = Callable[[np.ndarray, Hparams], list[np.ndarray]]
"""Maps a checkpoint's float32 tensor to the values of the tensors that upstream writes."""


def plus_one(values: np.ndarray, hparams: Hparams) -> list[np.ndarray]:
    """Undo the w - 1 of a stored norm."""
    return [values + np.float32(1)]


def split_kv_b(values: np.ndarray, hparams: Hparams) -> list[np.ndarray]:
    """Split `kv_b_proj` of latent attention, [heads * (nope + v), rank].

    Returns `k_b` [heads, rank, nope] and `v_b` [heads, v, rank]. Raises CheckpointError.
    """
    heads = hparams.count("num_attention_heads")
    nope = hparams.count("qk_nope_head_dim")
    v = hparams.count("v_head_dim")
    if values.shape[0] != heads * (nope + v):
        raise CheckpointError(
            f"kv_b_proj has {values.shape[0]} rows, but config.json has {heads} * ({nope} + {v})"
        )
    by_head = values.reshape(heads, nope + v, -1)
    return [by_head[:, :nope].transpose(0, 2, 1), by_head[:, nope:]]


def interleaved(heads: str) -> Change:
    """Interleave the rotary halves of each head's rows, as for Llama's queries and keys.

    `heads` is the key of config.json with the number of heads.
    """

    def change(values: np.ndarray, hparams: Hparams) -> list[np.ndarray]:
        count = hparams.count(heads)
        if values.shape[0] % (2 * count):
            raise CheckpointError(
                f"a projection has {values.shape[0]} rows, not a multiple of 2 * {count} ({heads})"
            )
        halves = values.reshape(count, 2, -1, values.shape[-1])
        return [halves.swapaxes(1, 2).reshape(values.shape)]

    return change


@dataclass(frozen=True)
class Architecture:
    """How the pinned llama.cpp treats the head of a Hugging Face architecture."""

    gguf: str
    """The value of general.architecture."""
    prefix: str = ""
    """Prefix of the head's tensor names; empty if it is the layers from num_hidden_layers on."""
    layers: int = 1
    """Numbered layers of the checkpoint in one block of the GGUF."""
    blocks: int | None = None
    """Blocks of the head, if upstream assumes a number; None: num_nextn_predict_layers tells."""
    splits: bool = True
    """Whether upstream can leave the head out (--no-mtp) or write it alone (--mtp)."""
    whole: bool = True
    """Whether upstream can write trunk and head into one file."""
    repacked: bool = False
    """Whether it writes the weights of the head in Q8_0 and MXFP4, as in DeepSeek-V4."""
    only: str = ""
    """The part that the checkpoint is: trunk if its drafter is another checkpoint, or draft."""
    dropped: tuple[str, ...] = ()
    """Parts of the names of tensors that upstream leaves out."""
    outside: str = ""
    """Prefix of the head's tensors in the GGUF that are in none of its blocks."""
    drafts: bool = True
    """Whether llama-server can draft with the head."""
    needs: str = ""
    """A tensor that drafting needs in each block of the head."""
    ranked: str = ""
    """Ending of a fused projection whose FP8 rows each rank of a cluster quantized separately."""
    changes: Mapping[str, Change] = field(default_factory=dict)
    """Ending of a tensor's name: the change of its values."""
    models: str = ""
    """A model with this architecture, if the name does not tell."""


_LATENT = {"kv_b_proj.weight": split_kv_b}
_MIMO = Architecture(
    "mimo2", prefix="model.mtp.", blocks=3, needs="attn_qkv.weight", ranked="qkv_proj.weight"
)
_GEMMA = Architecture("gemma4", splits=False, only="trunk")
_GEMMA_DRAFTER = Architecture(
    "gemma4-assistant", splits=False, only="draft", dropped=("masked_embedding",)
)
_LLAMA = {
    "q_proj.weight": interleaved("num_attention_heads"),
    "k_proj.weight": interleaved("num_key_value_heads"),
}

ARCHITECTURES: dict[str, Architecture] = {
    "Glm4MoeForCausalLM": Architecture("glm4moe", models="GLM-4.5"),
    "Glm4MoeLiteForCausalLM": Architecture("deepseek2", changes=_LATENT, models="GLM-4.7-Flash"),
    "GlmMoeDsaForCausalLM": Architecture("glm-dsa", changes=_LATENT, models="GLM-5.2"),
    "Glm5NextForConditionalGeneration": Architecture(
        "glm5-next", drafts=False, changes=_LATENT, models="GLM-5.3-Flash"
    ),
    "DeepseekV32ForCausalLM": Architecture("deepseek32", changes=_LATENT),
    "DeepseekV4ForCausalLM": Architecture(
        "deepseek4", prefix="mtp.", blocks=1, whole=False, repacked=True, outside="output_hc_"
    ),
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
    "Gemma4ForConditionalGeneration": _GEMMA,
    "Gemma4ForCausalLM": _GEMMA,
    "Gemma4UnifiedForConditionalGeneration": _GEMMA,
    "Gemma4AssistantForCausalLM": _GEMMA_DRAFTER,
    "Gemma4UnifiedAssistantForCausalLM": _GEMMA_DRAFTER,
}
"""By the name in config.json.

Missing: architectures that mtpforge converts itself, heads that upstream drops (DeepSeek V3,
ERNIE), tokenizers that need code of the checkpoint (Kimi), and GLM-4.5V: llama-server aborts on its
head, which has multimodal rotation.
"""

_NORMS = ("norm.weight", "norm_embedding.weight", "norm_hidden.weight")
_QWEN = Architecture("", prefix="mtp.", blocks=1, changes=dict.fromkeys(_NORMS, plus_one))
PACKED: dict[str, Architecture] = {
    "Qwen3_5ForConditionalGeneration": replace(_QWEN, gguf="qwen35"),
    "Qwen3_5ForCausalLM": replace(_QWEN, gguf="qwen35"),
    "Qwen3_5MoeForConditionalGeneration": replace(_QWEN, gguf="qwen35moe"),
    "Qwen3_5MoeForCausalLM": replace(_QWEN, gguf="qwen35moe"),
    "Qwen3NextForCausalLM": replace(_QWEN, gguf="qwen3next"),
}
"""Architectures of ours, which upstream converts if their trunk is packed in NVFP4."""

VISION = (
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
    "Qwen4ExpForConditionalGeneration",
)
"""Architectures of ours whose vision tower upstream can convert and we can verify."""


def entry_of(name: str) -> Architecture:
    """Return the entry of an architecture in config.json."""
    return ARCHITECTURES.get(name) or PACKED[name]


def why_not_drafting(opened: Gguf) -> str | None:
    """Why the pinned llama-server cannot draft with a file's head; None if it can."""
    for entry in ARCHITECTURES.values():
        if entry.gguf != opened.architecture:
            continue
        loads = f"llama.cpp {PINNED} loads {entry.gguf} but cannot draft with"
        if not entry.drafts:
            return f"{loads} it"
        needed = [f"blk.{block}.{entry.needs}" for block in opened.head_blocks if entry.needs]
        if any(name not in opened.tensors for name in needed):
            return f"{loads} a head that has no {entry.needs}"
    return None
