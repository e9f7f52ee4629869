"""The two tiny models: configurations, the trunk from transformers, and the draft head.

Shapes: B (sequences), T (tokens), H (hidden size), V (vocabulary size).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers.models.qwen3_5 import modeling_qwen3_5 as dense
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5Config
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeConfig

TOKENS = 1268  # in the tokenizer
# Rows of the embedding: real models pad it too, and K-quants need multiples of 256.
PADDED_VOCABULARY = 1280


def _text_config(**changes: Any) -> dict[str, Any]:
    """The common settings, changed. Row lengths are multiples of 256, the block of K-quants."""
    layers, interval = changes["num_hidden_layers"], changes["full_attention_interval"]
    common = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "layer_types": [
            "full_attention" if (i + 1) % interval == 0 else "linear_attention"
            for i in range(layers)
        ],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 4096,
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        # 64 * 0.25 = 16 rotated dimensions, so the three sections share 8 frequencies.
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000,
            "rope_type": "default",
        },
        "use_cache": True,
        "vocab_size": PADDED_VOCABULARY,
    }
    return dict(sorted({**common, **changes}.items()))


TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    # Fewer key heads than value heads: the converter has to regroup the value heads of every
    # linear_attn tensor.
    "tiny-qwen3.5": _text_config(
        model_type="qwen3_5_text",
        full_attention_interval=4,
        intermediate_size=256,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        mlp_only_layers=[],
        num_hidden_layers=4,
        tie_word_embeddings=True,
    ),
    # As many key heads as value heads; six experts, because a power of two hides mistakes.
    "tiny-qwen3.5-moe": _text_config(
        model_type="qwen3_5_moe_text",
        full_attention_interval=2,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        mlp_only_layers=[],
        moe_intermediate_size=256,
        num_experts=6,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        output_router_logits=False,
        router_aux_loss_coef=0.01,
        shared_expert_intermediate_size=256,
        tie_word_embeddings=False,
    ),
}


def checkpoint_config(name: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the contents of config.json, in the layout of real repositories."""
    text = copy.deepcopy(TEXT_CONFIGS[name])
    text["eos_token_id"] = tokenizer.token_to_id("<|endoftext|>")
    model_type = text["model_type"].removesuffix("_text")
    return {
        "architectures": [f"Qwen3_5{'Moe' if 'moe' in model_type else ''}ForConditionalGeneration"],
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "model_type": model_type,
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "transformers_version": "4.57.0.dev0",
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        # Never run: the tower exists so that readers have to skip its tensors.
        "vision_config": {
            "deepstack_visual_indexes": [],
            "depth": 1,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 16,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 32,
            "model_type": model_type,
            "num_heads": 2,
            "num_position_embeddings": 16,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
    }


class DraftHead(nn.Module):
    """One decoder block that reads the trunk's hidden states and predicts the token after the next.

    As in llama.cpp, position p gets token p and the trunk's normalised output at p - 1 (zeros at
    p = 0), and predicts token p + 1. Parameter names are those of the `mtp.*` tensors.
    """

    def __init__(self, text_config: Any, family: Any) -> None:
        super().__init__()
        prefix = "Qwen3_5Moe" if family is moe else "Qwen3_5"
        norm = getattr(family, f"{prefix}RMSNorm")
        block_config = copy.deepcopy(text_config)
        block_config.layer_types = ["full_attention"]
        block_config.num_hidden_layers = 1
        hidden, eps = text_config.hidden_size, text_config.rms_norm_eps
        self.pre_fc_norm_embedding = norm(hidden, eps=eps)
        self.pre_fc_norm_hidden = norm(hidden, eps=eps)
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.layers = nn.ModuleList(
            [getattr(family, f"{prefix}DecoderLayer")(block_config, layer_idx=0)]
        )
        self.norm = norm(hidden, eps=eps)

    def forward(self, embedded: Tensor, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """[B, T, H] embeddings and unshifted [B, T, H] trunk states to [B, T, H] before lm_head."""
        shifted = F.pad(hidden, (0, 0, 1, 0))[:, :-1]
        x = self.fc(
            torch.cat(
                [self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(shifted)], dim=-1
            )
        )
        return self.norm(self.layers[0](x, position_embeddings=rotary))


class TinyModel(nn.Module):
    """A trunk from transformers (its vision tower only provides tensors) and a draft head."""

    def __init__(self, config: dict[str, Any], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.is_moe = "num_experts" in config["text_config"]
        self.family = moe if self.is_moe else dense
        config_class = Qwen3_5MoeConfig if self.is_moe else Qwen3_5Config
        hf_config = config_class(
            **{k: v for k, v in copy.deepcopy(config).items() if k != "architectures"}
        )
        hf_config.text_config._attn_implementation = "sdpa"
        self.trunk = getattr(self.family, config["architectures"][0])(hf_config).float()
        self.mtp = DraftHead(self.trunk.config.text_config, self.family).float()
        self.router_logits: list[Tensor] = []
        self._initialise()
        if self.is_moe:
            for module in self.modules():
                if isinstance(module, moe.Qwen3_5MoeTopKRouter):
                    module.register_forward_hook(
                        lambda _m, _i, output: self.router_logits.append(output[0])
                    )

    @torch.no_grad()
    def _initialise(self) -> None:
        """Small matrices, norms of the head far from zero, linear attention with a long memory.

        A head converted without the +1 on its norms must fail to draft. Equal offsets would not do:
        norms at -0.4 become factors of -0.4 instead of 0.6, the signs cancel from norm to norm, and
        half of the drafts survive. With the two input norms below zero (in real heads their mean is
        about -0.4) and all others above, a lost +1 flips the sign of the head's output. The spread
        also makes an extra +1 visible.

        The head's routed experts start large and its router decisive: otherwise such a small head
        learns to bypass them, and swapped experts would go unnoticed.
        """
        for name, parameter in self.named_parameters():
            if name.startswith("mtp.") and name.endswith(
                ("experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight")
            ):
                nn.init.normal_(parameter, std=0.08)
            elif parameter.ndim >= 2 and "conv1d" not in name:
                nn.init.normal_(parameter, std=0.02)
            elif name.startswith("mtp.pre_fc_norm"):
                nn.init.normal_(parameter, mean=-0.45, std=0.2)
            elif name.startswith("mtp."):
                nn.init.normal_(parameter, mean=0.4, std=0.15)
        for module in self.modules():
            if isinstance(module, (dense.Qwen3_5GatedDeltaNet, moe.Qwen3_5MoeGatedDeltaNet)):
                heads = module.dt_bias.numel()
                module.A_log.copy_(torch.linspace(1.0, 8.0, heads).log())
                # softplus(dt_bias) spread from 0.1 to 0.002: the decay per token, times A.
                rate = torch.logspace(-1.0, -2.7, heads)
                module.dt_bias.copy_(rate + torch.log(-torch.expm1(-rate)))

    @property
    def text(self) -> nn.Module:
        return self.trunk.model.language_model

    def trunk_states(self, tokens: Tensor, cache: Any = None) -> Tensor:
        """[B, T] tokens to [B, T, H] after the output norm: input of lm_head and draft head."""
        return self.text(
            input_ids=tokens, past_key_values=cache, use_cache=cache is not None
        ).last_hidden_state

    def logits(self, states: Tensor) -> Tensor:
        """[..., H] to [..., V]."""
        return self.trunk.lm_head(states)

    def draft_states(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """[B, T] tokens and [B, T, H] trunk states to the head's [B, T, H].

        Row p predicts token p + 1.
        """
        positions = torch.arange(tokens.shape[1]).expand(3, tokens.shape[0], -1)
        return self.mtp(
            self.text.embed_tokens(tokens), hidden, self.text.rotary_emb(hidden, positions)
        )

    def balance_loss(self) -> Tensor:
        """Load-balancing loss over all layers run since the last call, including the head's."""
        config = self.trunk.config.text_config
        collected, self.router_logits = self.router_logits, []
        if not collected:
            return torch.zeros(())
        return moe.load_balancing_loss_func(
            tuple(collected), config.num_experts, config.num_experts_per_tok
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor with the name and layout of real checkpoints."""
        tied = self.trunk.config.tie_word_embeddings
        for name, tensor in self.trunk.state_dict().items():
            if not (tied and name == "lm_head.weight"):
                yield name, tensor
        for name, tensor in self.mtp.state_dict().items():
            stem, _, leaf = name.rpartition(".")
            # The trunk keeps its experts fused, the head has one tensor for each.
            if leaf == "gate_up_proj":  # [E, 2 * ff, H]
                for expert, (gate, up) in enumerate(zip(*tensor.chunk(2, dim=1), strict=True)):
                    yield f"mtp.{stem}.{expert}.gate_proj.weight", gate
                    yield f"mtp.{stem}.{expert}.up_proj.weight", up
            elif leaf == "down_proj":  # [E, H, ff]
                for expert, down in enumerate(tensor):
                    yield f"mtp.{stem}.{expert}.down_proj.weight", down
            else:
                yield f"mtp.{name}", tensor
