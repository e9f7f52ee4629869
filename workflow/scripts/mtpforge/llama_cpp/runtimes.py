"""First runtime versions that draft with a head, by the architecture of the GGUF.

From the pull requests and release notes of llama.cpp and ik_llama.cpp. The model card and
docs/models.md show them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Runtime:
    """First builds that draft with an architecture."""

    llama_cpp: str = ""
    """llama.cpp's first build; empty if none drafts with it."""
    pull_requests: tuple[int, ...] = ()
    """Pull requests of llama.cpp that added it."""
    note: str = ""
    """Other features that need a newer llama.cpp."""
    counted: bool = False
    """Whether the build was counted from the history, so that the release may be the next one."""
    ik_llama_cpp: tuple[int, ...] | None = ()
    """Pull requests of ik_llama.cpp; empty if it does not draft with it, None if unknown."""

    @property
    def least(self) -> str:
        """The llama.cpp that drafts, such as "b9180 or newer"."""
        first, separator, more = self.llama_cpp.partition("; ")
        return f"{first}{'' if first.startswith('newer') else ' or newer'}{separator}{more}"


_QWEN35 = "b9180; b9495 or newer recommended (fixes the hidden state that the head gets)"

RUNTIMES: dict[str, Runtime] = {
    "qwen35": Runtime(_QWEN35, (22673, 24025), ik_llama_cpp=(1698, 1745)),
    "qwen35moe": Runtime(
        _QWEN35,
        (22673, 24025, 24986),
        note="llama-quantize from b9789",
        ik_llama_cpp=(1698, 1745),
    ),
    "qwen3next": Runtime("b10238", (25589,)),
    "qwen4exp": Runtime("newer than b11312", (27742, 28243), ik_llama_cpp=None),
    "glm4moe": Runtime("b10603", (26534,), ik_llama_cpp=(1270,)),
    "deepseek2": Runtime("b10251", (24868,), counted=True, ik_llama_cpp=None),
    "glm-dsa": Runtime("b10174", (25980,), counted=True, ik_llama_cpp=(1890,)),
    "deepseek32": Runtime("b10237", (26457,)),
    "deepseek4": Runtime("of 2 August 2026", (25784,)),
    "step35": Runtime("b9480 (with three blocks b9745)", (23274, 24340), ik_llama_cpp=None),
    "nemotron_h_moe": Runtime("b10344", (26725,)),
    "mimo2": Runtime("b10184", (26228,), counted=True),
    "hy_v3": Runtime("b9993", (25395,)),
    "cohere2moe": Runtime("newer than b9626", (24260,)),
    "bailingmoe3": Runtime("b10470", (26608,), ik_llama_cpp=None),
    "gemma4-assistant": Runtime("b9551 (for E2B and E4B b9568)", (23398, 24282), ik_llama_cpp=None),
    "bailingmoe2": Runtime(),
    "exaone-moe": Runtime(),
    "glm5-next": Runtime(),
}

PINNED = "b11434"
"""Build of the pinned llama.cpp."""

BROKEN = "b10741 to b10748"
"""Builds that fail when they draft."""

OLLAMA = "0.24.0"
OLLAMA_ISSUE = 16282
OLLAMA_WITHOUT = ("qwen35", "qwen35moe")
"""Architectures whose files this Ollama does not load if they have a head."""

OLLAMA_DRAFTS = "0.30.0"
"""First Ollama that runs GGUFs with llama-server, and drafts with an embedded head if the Modelfile
has `draft_num_predict`: from its source and documentation."""

LM_STUDIO = "0.4.14"
"""First version that drafts with an embedded head."""
