# BF16 GGUF to a quantized one, the head at its own type.
# Needs: what conversion made, and llama-quantize.
# Makes: results/<model>/work/quantized/<variant>.gguf, and trunk/<type>.gguf, a head-less base to inject into.


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


rule quantize:
    input:
        code=code("quantize.py"),
        toolchain="resources/toolchain/stamp.json",
        source=ancient("results/{model}/work/convert/all.gguf"),
        digests="results/{model}/work/convert/all.json",
        recipe="results/{model}/work/recipes/{variant}.yaml",
    output:
        temp("results/{model}/work/quantized/{variant}.gguf"),
    log:
        "logs/{model}/quantize-{variant}.log",
    benchmark:
        "benchmarks/{model}/quantize-{variant}.jsonl"
    conda:
        "../../envs/run.yaml"
    threads: 64
    params:
        type=build.file_type,
        head=build.head,
    message:
        "{wildcards.model}: quantize {wildcards.variant} ({params.type}, head {params.head})"
    shell:
        "python {input.code[0]:q} {input.source:q} --type {params.type} --head {params.head}"
        " --tensors {input.recipe:q} --threads {threads} --log {log:q} --out {output:q}"


rule quantize_trunk:
    input:
        code=code("quantize.py"),
        toolchain="resources/toolchain/stamp.json",
        source=ancient("results/{model}/work/convert/trunk.gguf"),
        digests="results/{model}/work/convert/trunk.json",
    output:
        temp("results/{model}/work/trunk/{type}.gguf"),
    log:
        "logs/{model}/quantize-trunk-{type}.log",
    benchmark:
        "benchmarks/{model}/quantize-trunk-{type}.jsonl"
    wildcard_constraints:
        type="[A-Z0-9_]+",
    conda:
        "../../envs/run.yaml"
    threads: 64
    message:
        "{wildcards.model}: quantize the trunk alone ({wildcards.type})"
    shell:
        "python {input.code[0]:q} {input.source:q} --type {wildcards.type}"
        " --threads {threads} --log {log:q} --out {output:q}"
