"""Which llama.cpp drafts with a head first, by the architecture of the GGUF; README.md has the pull requests too."""

LLAMA_CPP = {
    "qwen35": "b9180, better b9495 (the hidden state after its norm)",
    "qwen35moe": "b9180, better b9495 (the hidden state after its norm)",
    "qwen3next": "b10238",
    "glm4moe": "b10603",
    "deepseek2": "b10251",
    "glm-dsa": "b10174",
    "deepseek32": "b10237",
    "step35": "b9480, with three blocks b9745",
    "nemotron_h_moe": "b10344",
    "mimo2": "b10184",
    "hy_v3": "b9993",
    "cohere2moe": "after b9626",
    "bailingmoe3": "b10470",
}
"""`general.architecture` -> builds; not here: what none drafts with."""

BROKEN = "b10741 to b10748"
"""Builds that fail when they draft."""

OLLAMA_WITHOUT = ("qwen35", "qwen35moe")
"""Architectures whose files Ollama 0.24.0 does not load where they have a head (its issue 16282)."""

LM_STUDIO = "0.4.14"
"""The first that drafts with an embedded head."""
