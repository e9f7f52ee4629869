# Verifies a file, and only then gives it its final name.
# Needs: the finished file, the checkpoint and base that it was made from, llama-server, prompts.
# Makes: results/<model>/<name>-<variant>.gguf, or a folder of that name for a split file;
# mtp-<name>-<type>.gguf; mmproj-<name>-F16.gguf; and a report on each.


rule acceptance:
    input:
        code=code("acceptance.py"),
        programs=stamps("llama-server"),
        file=ancient(build.verify.measured),
        digests=build.verify.measured_digests,
        prompts=build.verify.prompt_files,
    output:
        "results/{model}/work/acceptance.json",
    log:
        "logs/{model}/acceptance.log",
    benchmark:
        "benchmarks/{model}/acceptance.jsonl"
    conda:
        "../../envs/run.yaml"
    threads: build.needs.threads
    resources:
        **asked(build.needs.acceptance),
        gpu=build.needs.gpu,
    params:
        code=digest("acceptance.py"),
        prompts=build.verify.prompts,
        target=build.verify.target_option,
    message:
        "{wildcards.model}: acceptance of the BF16 file, to compare quantizations with"
    shell:
        "python {input.code[0]:q} {input.file[0]:q} {params.target} --prompts {params.prompts:q}"
        " --threads {threads} --recorded {input.digests[0]:q} --out {output:q}"
        " > {log:q} 2>&1"


rule verify:
    input:
        code=code("verify.py"),
        programs=stamps("llama-server", "llama-gguf-split"),
        file=ancient(build.verify.candidate),
        digests=build.verify.digests,
        unquantized=build.verify.unquantized,
        reference=ancient(build.verify.reference_file),
        reference_digests=build.verify.reference_digests,
        checkpoint=build.fetch.variant_inputs,
        recipe="results/{model}/work/recipes/{variant}.yaml",
        head_recipe="results/{model}/work/head-recipes/{variant}.yaml",
        prompts=build.verify.prompt_files,
    output:
        file="results/{model}/{base}-{variant}.gguf",
        report="results/{model}/reports/{base}-{variant}.json",
    log:
        "logs/{model}/verify-{base}-{variant}.log",
    benchmark:
        "benchmarks/{model}/verify-{base}-{variant}.jsonl"
    priority: build.publish.priority
    conda:
        "../../envs/run.yaml"
    threads: build.needs.threads
    resources:
        **asked(build.needs.verify),
        gpu=build.needs.gpu,
    params:
        code=digest("verify.py"),
        source=build.verify.source_option,
        prompts=build.verify.prompts,
        options=build.verify.options,
        kept="results/{model}/work/manifests/quantized/{variant}.gguf",
    message:
        "{wildcards.model}: verify {wildcards.variant}"
    shell:
        "python {input.code[0]:q} {input.file:q} {params.source} --tensors {input.recipe:q}"
        " --head-tensors {input.head_recipe:q} --prompts {params.prompts:q} {params.options}"
        " --threads {threads}"
        " --publish {output.file:q} --out {output.report:q} > {log:q} 2>&1"
        " && rm -f {params.kept:q}"


use rule verify as verify_split with:
    output:
        file=directory("results/{model}/{base}-{variant}"),
        report="results/{model}/reports/{base}-{variant}.split.json",
    log:
        "logs/{model}/verify-split-{base}-{variant}.log",
    benchmark:
        "benchmarks/{model}/verify-split-{base}-{variant}.jsonl"
    params:
        code=digest("verify.py"),
        source=build.verify.source_option,
        prompts=build.verify.prompts,
        options=build.verify.split_options,
        kept="results/{model}/work/manifests/quantized/{variant}.gguf",
    message:
        "{wildcards.model}: verify {wildcards.variant} and split it"


# If BF16 is too large for the memory, a quant is run, here and below. That is only to show that the
# file works with its model, so another quant is no reason to do it again.
rule verify_sidecar:
    input:
        code=code("verify.py"),
        programs=stamps("llama-server", "llama-gguf-split"),
        file=ancient(build.verify.sidecar),
        digests=build.verify.sidecar_digests,
        target=ancient(build.verify.sidecar_target),
        target_digests=build.verify.sidecar_target_digests,
        quant=ancient(build.verify.quant),
        quant_digests=ancient(build.verify.quant_digests),
        reference=ancient(build.verify.sidecar_reference_file),
        reference_digests=build.verify.sidecar_reference_digests,
        checkpoint=build.fetch.sidecar_inputs,
        prompts=build.verify.prompt_files,
        unquantized=build.verify.sidecar_unquantized,
    output:
        file="results/{model}/mtp-{base}-{type}.gguf",
        report="results/{model}/reports/mtp-{base}-{type}.json",
    log:
        "logs/{model}/verify-mtp-{base}-{type}.log",
    benchmark:
        "benchmarks/{model}/verify-mtp-{base}-{type}.jsonl"
    wildcard_constraints:
        type="[A-Z0-9_]+",
    conda:
        "../../envs/run.yaml"
    threads: build.needs.threads
    resources:
        **asked(build.needs.verify_beside),
        gpu=build.needs.gpu,
    params:
        code=digest("verify.py"),
        source=build.verify.sidecar_source_option,
        tokenizer=build.convert.tokenizer_option,
        prompts=build.verify.prompts,
        options=build.verify.sidecar_options,
        quant=build.verify.quant_option,
    message:
        "{wildcards.model}: verify the draft sidecar ({wildcards.type})"
    shell:
        "python {input.code[0]:q} {input.file:q} --target {input.target:q} {params.source}"
        " --target-recorded {input.target_digests:q} {params.quant}"
        " {params.tokenizer} --digests {input.digests:q}"
        " {params.options}"
        " --prompts {params.prompts:q} --threads {threads}"
        " --publish {output.file:q} --out {output.report:q} > {log:q} 2>&1"


rule verify_mmproj:
    input:
        code=code("verify.py"),
        programs=stamps("llama-server", "llama-gguf-split"),
        file=ancient(build.verify.mmproj),
        digests="results/{model}/work/convert/mmproj.json",
        target=ancient(build.convert.unquantized_file),
        target_digests=build.convert.unquantized_digests,
        quant=ancient(build.verify.quant),
        quant_digests=ancient(build.verify.quant_digests),
    output:
        file="results/{model}/mmproj-{base}-F16.gguf",
        report="results/{model}/reports/mmproj-{base}-F16.json",
    log:
        "logs/{model}/verify-mmproj-{base}.log",
    benchmark:
        "benchmarks/{model}/verify-mmproj-{base}.jsonl"
    conda:
        "../../envs/run.yaml"
    threads: build.needs.threads
    resources:
        **asked(build.needs.verify_beside),
        gpu=build.needs.gpu,
    params:
        code=digest("verify.py"),
        quant=build.verify.quant_option,
    message:
        "{wildcards.model}: verify the vision tower"
    shell:
        "python {input.code[0]:q} {input.file:q} --digests {input.digests:q}"
        " --target {input.target:q} --target-recorded {input.target_digests:q} {params.quant}"
        " --threads {threads}"
        " --publish {output.file:q} --out {output.report:q} > {log:q} 2>&1"
