# BF16 GGUF to a quantized one, the head at its own type.
# Needs: what conversion made, and llama-quantize.
# Makes: results/<model>/work/quantized/<variant>.gguf; imatrix/<text>.gguf, an importance matrix; trunk/<type>.gguf, a head-less
# base to inject into; draft/<type>.gguf, the head as a draft model of its own; and beside each quantization its digests.


rule recipe:
    output:
        "results/{model}/work/recipes/{variant}.yaml",
    log:
        "logs/{model}/recipe-{variant}.log",
    conda:
        "../../envs/run.yaml"
    params:
        recipe=build.recipe,
    message:
        "{wildcards.model}: recipe of {wildcards.variant}"
    shell:
        "printf '%s\\n' {params.recipe:q} > {output:q} 2> {log:q}"


# <text> is the name of a text, with a part of the sha256 of its path.
rule imatrix:
    input:
        code=code("imatrix.py"),
        toolchain="resources/toolchain/stamp.json",
        source=ancient(build.unquantized_file),
        digests=build.unquantized_digests,
        text=build.imatrix_text,
    output:
        temp("results/{model}/work/imatrix/{text}.gguf"),
    log:
        "logs/{model}/imatrix-{text}.log",
    benchmark:
        "benchmarks/{model}/imatrix-{text}.jsonl"
    wildcard_constraints:
        text="[^/]+",
    conda:
        "../../envs/run.yaml"
    threads: 64
    message:
        "{wildcards.model}: importance matrix from {input.text}"
    shell:
        "python {input.code[0]:q} {input.source:q} --text {input.text:q} --threads {threads} --log {log:q} --out {output:q}"


rule quantize:
    input:
        code=code("quantize.py"),
        toolchain="resources/toolchain/stamp.json",
        source=ancient(build.source),
        digests=build.source_digests,
        recipe="results/{model}/work/recipes/{variant}.yaml",
        imatrix=build.imatrix_if_any,
    output:
        file=temp("results/{model}/work/quantized/{variant}.gguf"),
        digests="results/{model}/work/quantized/{variant}.json",
    log:
        "logs/{model}/quantize-{variant}.log",
    benchmark:
        "benchmarks/{model}/quantize-{variant}.jsonl"
    conda:
        "../../envs/run.yaml"
    threads: 64
    params:
        type=build.file_type,
        head=build.head_option,
        imatrix=build.imatrix_option,
    message:
        "{wildcards.model}: quantize {wildcards.variant} ({params.type} {params.head})"
    shell:
        "python {input.code[0]:q} {input.source:q} --type {params.type} {params.head}"
        " --tensors {input.recipe:q} {params.imatrix} --threads {threads} --log {log:q}"
        " --digests {output.digests:q} --out {output.file:q}"


rule quantize_part:
    input:
        code=code("quantize.py"),
        toolchain="resources/toolchain/stamp.json",
        source=ancient("results/{model}/work/convert/{part}.gguf"),
        digests="results/{model}/work/convert/{part}.json",
    output:
        file=temp("results/{model}/work/{part}/{type}.gguf"),
        digests="results/{model}/work/{part}/{type}.json",
    log:
        "logs/{model}/quantize-{part}-{type}.log",
    benchmark:
        "benchmarks/{model}/quantize-{part}-{type}.jsonl"
    wildcard_constraints:
        part="trunk|draft",
        type="[A-Z0-9_]+",
    conda:
        "../../envs/run.yaml"
    threads: 64
    params:
        head=build.part_head_option,
    message:
        "{wildcards.model}: quantize the {wildcards.part} alone ({wildcards.type})"
    shell:
        "python {input.code[0]:q} {input.source:q} --type {wildcards.type} {params.head}"
        " --threads {threads} --log {log:q}"
        " --digests {output.digests:q} --out {output.file:q}"
