# From a BF16 GGUF to a quantized one, with the head at its own type.
# Needs: the converted checkpoint, and llama-quantize.
# Makes, under results/<model>/work/: quantized/<variant>.gguf; imatrix/<text>.gguf, an importance
# matrix, from conversations/<text>.txt with `chat`; coverage/<matrix>.json; trunk/<type>.gguf, a base
# without a head to inject into; draft/<type>.gguf, the head as a separate draft model; the digests of
# each file beside it; and manifests/, which lists where to find each finished tensor, and keeps the
# pieces of unfinished files and hard links to unverified ones.


rule recipe:
    output:
        tensors="results/{model}/work/recipes/{variant}.yaml",
        head="results/{model}/work/head-recipes/{variant}.yaml",
    log:
        "logs/{model}/recipe-{variant}.log",
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.small),
    params:
        tensors=build.quantize.recipe,
        head=build.quantize.head_recipe,
    message:
        "{wildcards.model}: recipe of {wildcards.variant}"
    shell:
        "{{ printf '%s\\n' {params.tensors:q} > {output.tensors:q}.$$.part"
        " && printf '%s\\n' {params.head:q} > {output.head:q}.$$.part"
        " && mv {output.tensors:q}.$$.part {output.tensors:q}"
        " && mv {output.head:q}.$$.part {output.head:q}; }} 2> {log:q}"


# <text> is the name of a text, followed by part of the sha256 of its path.
rule conversations:
    input:
        code=code("conversations.py"),
        programs=stamps("llama-server"),
        source=ancient(build.convert.unquantized_file),
        digests=build.convert.unquantized_digests,
        texts=ancient(build.quantize.texts),
        text_record=build.quantize.text_record,
    output:
        "results/{model}/work/conversations/{text}.txt",
    log:
        "logs/{model}/conversations-{text}.log",
    wildcard_constraints:
        text="[^/]+",
    conda:
        "../../envs/run.yaml"
    threads: build.needs.threads
    resources:
        **asked(build.needs.imatrix),
        gpu=build.needs.gpu,
    params:
        code=digest("conversations.py"),
        text=build.quantize.text,
    message:
        "{wildcards.model}: put {params.text} through the chat template"
    shell:
        "python {input.code[0]:q} {input.source:q} --text {params.text:q} --threads {threads}"
        " --text-recorded {input.text_record:q} --out {output:q} > {log:q} 2>&1"


rule imatrix:
    input:
        code=code("imatrix.py"),
        programs=stamps("llama-server", "llama-imatrix"),
        source=ancient(build.convert.unquantized_file),
        digests=build.convert.unquantized_digests,
        text=build.quantize.imatrix_text_inputs,
    output:
        file=temp("results/{model}/work/imatrix/{text}.gguf"),
        digest="results/{model}/work/imatrix/{text}.json",
    log:
        "logs/{model}/imatrix-{text}.log",
    benchmark:
        "benchmarks/{model}/imatrix-{text}.jsonl"
    wildcard_constraints:
        text="[^/]+",
    conda:
        "../../envs/run.yaml"
    threads: build.needs.threads
    resources:
        **asked(build.needs.imatrix),
        gpu=build.needs.gpu,
    params:
        code=digest("imatrix.py"),
        text=build.quantize.imatrix_text,
        options=build.quantize.imatrix_text_options,
    message:
        "{wildcards.model}: importance matrix from {params.text}"
    shell:
        "python {input.code[0]:q} {input.source:q} --text {params.text:q} {params.options}"
        " --threads {threads} --recorded {input.digests:q} --log {log:q}"
        " --digest {output.digest:q} --out {output.file:q} >> {log:q} 2>&1"


rule coverage:
    input:
        code=code("imatrix_coverage.py"),
        source=ancient(build.convert.unquantized_file),
        digests=build.convert.unquantized_digests,
        imatrix=ancient(build.quantize.imatrix_files),
        imatrix_digest=build.quantize.imatrix_inputs,
    output:
        "results/{model}/work/coverage/{matrix}.json",
    log:
        "logs/{model}/coverage-{matrix}.log",
    wildcard_constraints:
        matrix="[^/]+",
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.resolve),
    params:
        code=digest("imatrix_coverage.py"),
        imatrix=build.quantize.imatrix_option,
    message:
        "{wildcards.model}: coverage of the importance matrix {wildcards.matrix}"
    shell:
        "python {input.code[0]:q} {input.source:q} {params.imatrix} --out {output:q} > {log:q} 2>&1"


# <kind> is `quantized` and <name> a variant, or <kind> is `trunk` or `draft` and <name> a type.
# The plan alone decides whether `quantize` reruns, so rules that read the source take it as
# `ancient`.
# The number of pieces depends on the machine, so it is in a separate file. `plan_types` is a
# checkpoint because the graph depends on it: whether `quantize` has anything to do, and in how many
# pieces.
checkpoint plan_types:
    input:
        code=code("quantize_plan.py"),
        programs=stamps("llama-quantize"),
        source=ancient(build.quantize.source),
        digests=build.quantize.source_digests,
        recipe=build.quantize.recipe_inputs,
        imatrix=ancient(build.quantize.imatrix_files),
        imatrix_digest=build.quantize.imatrix_inputs,
    output:
        plan="results/{model}/work/plans/{kind}/{name}.json",
        pieces="results/{model}/work/plans/{kind}/{name}.pieces",
    log:
        "logs/{model}/plan-{kind}-{name}.log",
    wildcard_constraints:
        kind="quantized|trunk|draft",
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.resolve),
        # No parameters, so that other numbers rerun nothing.
        machines=1,
        piece_threads=build.needs.piece_threads(workflow.resource_settings.max_threads),
    params:
        code=digest("quantize_plan.py"),
        options=build.quantize.options,
        imatrix=build.quantize.imatrix_option,
        imatrix_recorded=build.quantize.imatrix_recorded_option,
    message:
        "{wildcards.model}: plan {wildcards.name} ({wildcards.kind})"
    shell:
        "python {input.code[0]:q} {input.source:q} {params.options} {params.imatrix}"
        " {params.imatrix_recorded}"
        " --digests {input.digests:q} --threads {resources.piece_threads}"
        " --machines {resources.machines} --pieces {output.pieces:q}"
        " --out {output.plan:q} > {log:q} 2>&1"


# Here and below the tensors are not outputs: Snakemake would delete them before they can be reused.
rule piece:
    input:
        code=code("quantize.py"),
        plan="results/{model}/work/plans/{kind}/{name}.json",
        source=ancient(build.quantize.source),
        imatrix=ancient(build.quantize.imatrix_files),
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
    threads: build.needs.threads
    resources:
        **asked(build.needs.quantize),
    params:
        code=digest("quantize.py"),
        imatrix=build.quantize.imatrix_option,
        made="results/{model}/work/manifests/pieces/{kind}/{name}",
    message:
        "{wildcards.model}: quantize {wildcards.name} ({wildcards.kind}),"
        " piece {wildcards.piece} of {wildcards.pieces}"
    shell:
        "python {input.code[0]:q} {input.source:q} --plan {input.plan:q} {params.imatrix}"
        " --piece {wildcards.piece}/{wildcards.pieces} --reuse results --threads {threads}"
        " --log {log:q} --digests {output.digests:q} --out {params.made:q} >> {log:q} 2>&1"


rule quantize:
    input:
        code=code("quantize.py"),
        plan="results/{model}/work/plans/{kind}/{name}.json",
        source=ancient(build.quantize.source),
        imatrix=ancient(build.quantize.imatrix_files),
        pieces=build.quantize.pieces,
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
    threads: build.needs.threads
    resources:
        **asked(build.needs.quantize),
    params:
        code=digest("quantize.py"),
        imatrix=build.quantize.imatrix_option,
        also=build.quantize.names_option,
        manifest="results/{model}/work/manifests/{kind}/{name}.json",
        pieces="results/{model}/work/manifests/pieces/{kind}/{name}",
    message:
        "{wildcards.model}: quantize {wildcards.name} ({wildcards.kind})"
    shell:
        "python {input.code[0]:q} {input.source:q} --plan {input.plan:q} {params.imatrix}"
        " --reuse results --manifest {params.manifest:q} {params.also} --threads {threads}"
        " --log {log:q} --digests {output.digests:q} --out {output.file:q}"
        " >> {log:q} 2>&1 && rm -rf {params.pieces:q}"
