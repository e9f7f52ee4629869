# Proof, and only then the final name.
# Needs: a finished file, the checkpoint (and base) that it is made of, llama-server, prompts.
# Makes: results/<model>/<name>-<variant>.gguf, or a folder of that name with the files of a split one; mtp-<name>-<type>.gguf;
# and a report on each.


rule acceptance:
    input:
        code=code("acceptance.py"),
        toolchain="resources/toolchain/stamp.json",
        file=ancient("results/{model}/work/convert/all.gguf"),
        digests="results/{model}/work/convert/all.json",
        prompts=build.prompt_files,
    output:
        "results/{model}/work/acceptance.json",
    log:
        "logs/{model}/acceptance.log",
    benchmark:
        "benchmarks/{model}/acceptance.jsonl"
    conda:
        "../../envs/run.yaml"
    threads: 64
    params:
        prompts=build.prompts,
    message:
        "{wildcards.model}: what the BF16 file accepts, for its quantizations to be compared with"
    shell:
        "python {input.code[0]:q} {input.file:q} --prompts {params.prompts:q} --threads {threads} --out {output:q} 2>&1 | tee {log:q}"


rule verify:
    input:
        code=code("verify.py"),
        toolchain="resources/toolchain/stamp.json",
        file=ancient(build.candidate),
        digests=build.digests,
        unquantized=build.unquantized_if_any,
        reference=ancient(build.reference),
        checkpoint=build.checkpoint_inputs,
        recipe="results/{model}/work/recipes/{variant}.yaml",
        prompts=build.prompt_files,
    output:
        file="results/{model}/{base}-{variant}.gguf",
        report="results/{model}/reports/{base}-{variant}.json",
    log:
        "logs/{model}/verify-{base}-{variant}.log",
    benchmark:
        "benchmarks/{model}/verify-{base}-{variant}.jsonl"
    conda:
        "../../envs/run.yaml"
    threads: 64
    params:
        source=build.source_option,
        prompts=build.prompts,
        options=build.verify_options,
        kept="results/{model}/work/manifests/quantized/{variant}.gguf",
    message:
        "{wildcards.model}: verify {wildcards.variant}"
    shell:
        "python {input.code[0]:q} {input.file:q} {params.source} --tensors {input.recipe:q}"
        " --prompts {params.prompts:q} {params.options} --threads {threads}"
        " --publish {output.file:q} --out {output.report:q} 2>&1 | tee {log:q} && rm -f {params.kept:q}"


use rule verify as verify_split with:
    output:
        file=directory("results/{model}/{base}-{variant}"),
        report="results/{model}/reports/{base}-{variant}.split.json",
    log:
        "logs/{model}/verify-split-{base}-{variant}.log",
    benchmark:
        "benchmarks/{model}/verify-split-{base}-{variant}.jsonl"
    params:
        source=build.source_option,
        prompts=build.prompts,
        options=build.split_options,
        kept="results/{model}/work/manifests/quantized/{variant}.gguf",
    message:
        "{wildcards.model}: verify {wildcards.variant} and split it"


rule verify_sidecar:
    input:
        code=code("verify.py"),
        toolchain="resources/toolchain/stamp.json",
        file=ancient(build.sidecar),
        digests=build.sidecar_digests,
        target=ancient("results/{model}/work/convert/all.gguf"),
        target_digests="results/{model}/work/convert/all.json",
        reference=ancient(build.draft_reference),
        checkpoint=build.checkpoint_inputs,
        prompts=build.prompt_files,
        unquantized=build.unquantized_of_sidecar,
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
    threads: 64
    params:
        source=build.draft_source_option,
        tokenizer=build.tokenizer_option,
        prompts=build.prompts,
        options=build.sidecar_options,
    message:
        "{wildcards.model}: verify the draft sidecar ({wildcards.type})"
    shell:
        "python {input.code[0]:q} {input.file:q} --target {input.target:q} {params.source} {params.tokenizer}"
        " --digests {input.digests:q}"
        " --type {wildcards.type} --head {wildcards.type} {params.options}"
        " --prompts {params.prompts:q} --threads {threads}"
        " --publish {output.file:q} --out {output.report:q} 2>&1 | tee {log:q}"


rule verify_mmproj:
    input:
        code=code("verify.py"),
        toolchain="resources/toolchain/stamp.json",
        file=ancient(build.mmproj),
        digests="results/{model}/work/convert/mmproj.json",
        target=ancient(build.unquantized_file),
        target_digests=build.unquantized_digests,
    output:
        file="results/{model}/mmproj-{base}-F16.gguf",
        report="results/{model}/reports/mmproj-{base}-F16.json",
    log:
        "logs/{model}/verify-mmproj-{base}.log",
    benchmark:
        "benchmarks/{model}/verify-mmproj-{base}.jsonl"
    conda:
        "../../envs/run.yaml"
    threads: 64
    message:
        "{wildcards.model}: verify the vision tower"
    shell:
        "python {input.code[0]:q} {input.file:q} --digests {input.digests:q} --target {input.target:q} --threads {threads}"
        " --publish {output.file:q} --out {output.report:q} 2>&1 | tee {log:q}"
