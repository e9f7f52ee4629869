# BF16 GGUF to a quantized one, the head at its own type.
# Needs: what conversion made, and llama-quantize.
# Makes: results/<model>/work/quantized/<variant>.gguf; imatrix/<text>.gguf, an importance matrix; trunk/<type>.gguf, a head-less
# base to inject into; draft/<type>.gguf, the head as a draft model of its own; beside each quantization its digests, and under
# manifests/ where each of its tensors can be found, with what nobody else keeps: pieces of what is not finished, and a second name
# of what is not verified.


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


# <kind> is quantized, trunk or draft, <name> a variant or, of a part alone, a type. The plan alone decides what is to be quantized:
# what reads the source has it as `ancient`, and the number of pieces, which depends on the machine, is no part of it. As a
# checkpoint, because only what it says can tell whether `quantize` has anything to do; what follows that is done again all the same.
checkpoint plan:
    input:
        code=code("quantize_plan.py"),
        toolchain="resources/toolchain/stamp.json",
        source=ancient(build.planned_source),
        digests=build.planned_digests,
        recipe=build.planned_recipe_if_any,
        imatrix=build.planned_imatrix_if_any,
    output:
        plan="results/{model}/work/plans/{kind}/{name}.json",
        pieces="results/{model}/work/plans/{kind}/{name}.pieces",
    log:
        "logs/{model}/plan-{kind}-{name}.log",
    wildcard_constraints:
        kind="quantized|trunk|draft",
    conda:
        "../../envs/run.yaml"
    threads: 64  # those of a quantization: what it takes on them decides in how many pieces it is made
    params:
        options=build.planned_options,
        imatrix=build.planned_imatrix_option,
    message:
        "{wildcards.model}: plan {wildcards.name} ({wildcards.kind}: {params.options})"
    shell:
        "python {input.code[0]:q} {input.source:q} {params.options} {params.imatrix}"
        " --digests {input.digests:q} --threads {threads} --pieces {output.pieces:q} --out {output.plan:q}"
        " 2>&1 | tee {log:q}"


# What is made is no output, here and below: Snakemake would delete it before what it has can be used again.
rule piece:
    input:
        code=code("quantize.py"),
        plan="results/{model}/work/plans/{kind}/{name}.json",
        source=ancient(build.planned_source),
        imatrix=ancient(build.planned_imatrix_if_any),
    output:
        digests="results/{model}/work/pieces/{kind}/{name}/{piece}-of-{pieces}.json",
    log:
        "logs/{model}/piece-{kind}-{name}-{piece}-of-{pieces}.log",
    benchmark:
        "benchmarks/{model}/piece-{kind}-{name}-{piece}-of-{pieces}.jsonl"
    wildcard_constraints:
        kind="quantized|trunk|draft",
        piece="[0-9]+",
        pieces="[0-9]+",
    conda:
        "../../envs/run.yaml"
    threads: 64
    params:
        imatrix=build.planned_imatrix_option,
        made="results/{model}/work/manifests/pieces/{kind}/{name}",
    message:
        "{wildcards.model}: quantize {wildcards.name} ({wildcards.kind}), piece {wildcards.piece} of {wildcards.pieces}"
    shell:
        "python {input.code[0]:q} {input.source:q} --plan {input.plan:q} {params.imatrix}"
        " --piece {wildcards.piece}/{wildcards.pieces} --reuse results --threads {threads} --log {log:q}"
        " --digests {output.digests:q} --out {params.made:q}"


rule quantize:
    input:
        code=code("quantize.py"),
        plan="results/{model}/work/plans/{kind}/{name}.json",
        source=ancient(build.planned_source),
        imatrix=ancient(build.planned_imatrix_if_any),
        pieces=build.pieces,
    output:
        file=temp("results/{model}/work/{kind}/{name}.gguf"),
        digests="results/{model}/work/{kind}/{name}.json",
    log:
        "logs/{model}/{kind}-{name}.log",
    benchmark:
        "benchmarks/{model}/{kind}-{name}.jsonl"
    wildcard_constraints:
        kind="quantized|trunk|draft",
    conda:
        "../../envs/run.yaml"
    threads: 64
    params:
        imatrix=build.planned_imatrix_option,
        also=build.planned_name_option,
        manifest="results/{model}/work/manifests/{kind}/{name}.json",
        pieces="results/{model}/work/manifests/pieces/{kind}/{name}",
    message:
        "{wildcards.model}: quantize {wildcards.name} ({wildcards.kind})"
    shell:
        "python {input.code[0]:q} {input.source:q} --plan {input.plan:q} {params.imatrix}"
        " --reuse results --manifest {params.manifest:q} {params.also} --threads {threads} --log {log:q}"
        " --digests {output.digests:q} --out {output.file:q} && rm -rf {params.pieces:q}"
