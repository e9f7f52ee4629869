# The best tensor types for a size, for variants with `size` or `bits`.
# Needs: the converted checkpoint, llama-quantize, and llama-perplexity unless `sensitivity: prior`.
# Makes, under results/<model>/work/: errors/<matrix>/<type>.json, the error of a tensor type;
# sensitivities/<matrix>/<text>-<method>.json, how much each group of tensors matters, with finished
# runs in probes/; found/<variant>.yaml, the recipe, which takes the place of one in
# config.yaml.
# <matrix> is the name of an importance matrix, or `plain` without one.


rule errors:
    input:
        code=code("quantization_errors.py"),
        programs=stamps("llama-quantize"),
        source=ancient(build.convert.unquantized_file),
        digests=build.convert.unquantized_digests,
        imatrix=ancient(build.search.imatrix_files),
        imatrix_digest=build.search.imatrix_inputs,
    output:
        "results/{model}/work/errors/{matrix}/{type}.json",
    log:
        "logs/{model}/errors-{matrix}-{type}.log",
    benchmark:
        "benchmarks/{model}/errors-{matrix}-{type}.jsonl"
    wildcard_constraints:
        matrix="[^/]+",
        type="[A-Z0-9_]+",
    conda:
        "../../envs/run.yaml"
    threads: build.needs.threads
    resources:
        **asked(build.needs.errors),
    params:
        code=digest("quantization_errors.py"),
        imatrix=build.search.imatrix_option,
        imatrix_recorded=build.search.imatrix_recorded_option,
    message:
        "{wildcards.model}: error of {wildcards.type}"
    shell:
        "python {input.code[0]:q} {input.source:q} --type {wildcards.type:q} {params.imatrix}"
        " {params.imatrix_recorded} --recorded {input.digests:q} --threads {threads}"
        " --log {log:q} --out {output:q} >> {log:q} 2>&1"


use rule reference_logits as search_logits with:
    input:
        code=code("reference_logits.py"),
        programs=stamps("llama-server", "llama-perplexity"),
        model=ancient(build.convert.unquantized_file),
        digests=build.convert.unquantized_digests,
        text=ancient(build.search.text),
        text_record=build.search.text_record,
    output:
        file=temp("results/{model}/work/search-logits/{text}.bin"),
        digest="results/{model}/work/search-logits/{text}.json",
    log:
        "logs/{model}/search-logits-{text}.log",
    benchmark:
        "benchmarks/{model}/search_logits-{text}.jsonl"
    wildcard_constraints:
        text="[^/]+",
    resources:
        **asked(build.needs.search_logits),
        gpu=build.needs.gpu,
    params:
        code=digest("reference_logits.py"),
        chunks=build.search.chunks,
    message:
        "{wildcards.model}: BF16 logits on {input.text}, for sensitivities"


# How many jobs share the runs of a search: `--set-scatter sensitivities=8`, or `set-scatter` in a
# profile. The results are the same for any number.
scattergather:
    sensitivities=1,


SHARES = len(gather.sensitivities("{scatteritem}"))


# With shares, this job only collects their results. Finished runs are not outputs: Snakemake would
# delete those of a job that was killed.
rule sensitivities:
    input:
        code=code("sensitivity.py"),
        programs=stamps("llama-quantize", "llama-perplexity"),
        source=ancient(build.convert.unquantized_file),
        digests=build.convert.unquantized_digests,
        text_record=build.search.text_record,
        logits=ancient(build.search.logits),
        logits_digest=build.search.logits_digest,
        imatrix=ancient(build.search.imatrix_files),
        imatrix_digest=build.search.imatrix_inputs,
        shares=lambda wildcards: build.search.shares(wildcards, SHARES),
    output:
        "results/{model}/work/sensitivities/{matrix}/{text}-{method}.json",
    log:
        "logs/{model}/sensitivities-{matrix}-{text}-{method}.log",
    benchmark:
        "benchmarks/{model}/sensitivities-{matrix}-{text}-{method}.jsonl"
    wildcard_constraints:
        matrix="[^/]+",
        text="[^/]+",
        method="class|tensor",
    conda:
        "../../envs/run.yaml"
    threads: build.needs.threads
    resources:
        **asked(build.needs.sensitivities),
        gpu=build.needs.gpu,
    params:
        code=digest("sensitivity.py"),
        imatrix=build.search.imatrix_option,
        share="",
        keep="results/{model}/work/probes",
    message:
        "{wildcards.model}: sensitivities by {wildcards.method}"
    shell:
        "python {input.code[0]:q} {input.source:q} --logits {input.logits:q} {params.imatrix}"
        " --by {wildcards.method} {params.share} --keep {params.keep:q}"
        " --inputs {input.digests:q} {input.text_record:q} {input.imatrix_digest:q}"
        " --threads {threads} --out {output:q} > {log:q} 2>&1"


use rule sensitivities as sensitivities_share with:
    input:
        code=code("sensitivity.py"),
        programs=stamps("llama-quantize", "llama-perplexity"),
        source=ancient(build.convert.unquantized_file),
        digests=build.convert.unquantized_digests,
        text_record=build.search.text_record,
        logits=ancient(build.search.logits),
        logits_digest=build.search.logits_digest,
        imatrix=ancient(build.search.imatrix_files),
        imatrix_digest=build.search.imatrix_inputs,
    output:
        "results/{model}/work/sensitivities/{matrix}/{text}-{method}/{piece}-of-{pieces}.json",
    log:
        "logs/{model}/sensitivities-{matrix}-{text}-{method}-{piece}-of-{pieces}.log",
    benchmark:
        "benchmarks/{model}/sensitivities-{matrix}-{text}-{method}-{piece}-of-{pieces}.jsonl"
    wildcard_constraints:
        matrix="[^/]+",
        text="[^/]+",
        method="class|tensor",
        piece="[0-9]+",
        pieces="[0-9]+",
    params:
        code=digest("sensitivity.py"),
        imatrix=build.search.imatrix_option,
        share="--piece {piece}/{pieces}",
        keep="results/{model}/work/probes",
    message:
        "{wildcards.model}: sensitivities by {wildcards.method},"
        " share {wildcards.piece} of {wildcards.pieces}"


rule allocate:
    input:
        code=code("allocate.py"),
        programs=stamps("llama-quantize"),
        source=ancient(build.search.source),
        digests=build.search.source_digests,
        errors=build.search.errors,
        measured=build.search.measured,
        head=build.search.head_recipe,
        imatrix=ancient(build.search.imatrix_files),
        imatrix_digest=build.search.imatrix_inputs,
    output:
        recipe="results/{model}/work/found/{variant}.yaml",
        about="results/{model}/work/found/{variant}.json",
    log:
        "logs/{model}/allocate-{variant}.log",
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.resolve),
    params:
        code=digest("allocate.py"),
        options=build.search.options,
        imatrix=build.search.imatrix_option,
        imatrix_recorded=build.search.imatrix_recorded_option,
    message:
        "{wildcards.model}: find the types of {wildcards.variant}"
    shell:
        "python {input.code[0]:q} {input.source:q} {params.options} --errors {input.errors:q}"
        " {params.imatrix} {params.imatrix_recorded} --digests {input.digests:q}"
        " --about {output.about:q} --out {output.recipe:q} > {log:q} 2>&1"


# llama.cpp's own mixture of the same size, with the same head and importance matrix, if the model
# has a text to measure both on.
rule compare:
    input:
        code=code("compare_stock.py"),
        programs=stamps("llama-quantize", "llama-perplexity"),
        source=ancient(build.search.source),
        digests=build.search.source_digests,
        about="results/{model}/work/found/{variant}.json",
        measurement=build.search.measurement,
        stock=build.search.stock,
        logits=ancient(build.search.reference),
        logits_digest=build.search.reference_digest,
        head=build.search.head_recipe,
        imatrix=ancient(build.search.imatrix_files),
        imatrix_digest=build.search.imatrix_inputs,
    output:
        "results/{model}/work/compared/{variant}.json",
    log:
        "logs/{model}/compare-{variant}.log",
    benchmark:
        "benchmarks/{model}/compare-{variant}.jsonl"
    conda:
        "../../envs/run.yaml"
    threads: build.needs.threads
    resources:
        **asked(build.needs.compare),
        gpu=build.needs.gpu,
    params:
        code=digest("compare_stock.py"),
        file=build.search.file_name,
        measured=build.search.measured_options,
        head=build.search.head_option,
        imatrix=build.search.imatrix_option,
        imatrix_recorded=build.search.imatrix_recorded_option,
    message:
        "{wildcards.model}: compare {wildcards.variant} with llama.cpp's own mixture"
    shell:
        "python {input.code[0]:q} {input.source:q} --file {params.file:q} --about {input.about:q}"
        " {params.measured} {params.head} {params.imatrix} {params.imatrix_recorded}"
        " --threads {threads} --out {output:q} > {log:q} 2>&1"
