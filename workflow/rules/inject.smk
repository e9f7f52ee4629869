# Injects a head into a GGUF that has none, or replaces its head.
# Needs: the base, the head as a BF16 GGUF, and llama-quantize for the type of the head.
# Makes: results/<model>/work/injected/<variant>.gguf, and beside it the sha256 of each tensor of
# the base's trunk and of the new head.


rule inject:
    input:
        code=code("inject.py"),
        programs=stamps("llama-quantize"),
        base=ancient(build.inject.base_files),
        base_digests=build.inject.base_inputs,
        head=ancient(build.inject.head_file),
        digests=build.inject.head_digests,
        head_recipe="results/{model}/work/head-recipes/{variant}.yaml",
    output:
        file=temp("results/{model}/work/injected/{variant}.gguf"),
        trunk="results/{model}/work/injected/{variant}.json",
    log:
        "logs/{model}/inject-{variant}.log",
    benchmark:
        "benchmarks/{model}/inject-{variant}.jsonl"
    conda:
        "../../envs/run.yaml"
    threads: build.needs.threads
    resources:
        **asked(build.needs.inject),
    params:
        code=digest("inject.py"),
        base=build.inject.base,
        head_type=build.inject.head_type,
        options=build.inject.options,
        recorded=build.inject.recorded_options,
    message:
        "{wildcards.model}: inject the head ({params.head_type}) into {params.base}"
    shell:
        "python {input.code[0]:q} {params.base:q} --head {input.head:q}"
        " --head-type {params.head_type:q} --head-tensors {input.head_recipe:q} {params.options}"
        " {params.recorded} --threads {threads}"
        " --digests {output.trunk:q} --out {output.file:q} > {log:q} 2>&1"
