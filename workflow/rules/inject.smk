# A head for a GGUF that lacks one, or that is to have another.
# Needs: the base, the head as a BF16 GGUF, and llama-quantize for the head's type.
# Makes: results/<model>/work/injected/<variant>.gguf, and beside it the sha256 of the trunk's tensors as they were
# before, and of the head's as they were then injected.


rule inject:
    input:
        code=code("inject.py"),
        toolchain="resources/toolchain/stamp.json",
        base=build.base_if_any,
        head=ancient(build.head_file),
        digests=build.head_digests,
    output:
        file=temp("results/{model}/work/injected/{variant}.gguf"),
        trunk="results/{model}/work/injected/{variant}.json",
    log:
        "logs/{model}/inject-{variant}.log",
    benchmark:
        "benchmarks/{model}/inject-{variant}.jsonl"
    conda:
        "../../envs/run.yaml"
    params:
        base=build.base,
        head_type=build.head,
        options=build.inject_options,
    message:
        "{wildcards.model}: inject the head ({params.head_type}) into {params.base}"
    shell:
        "python {input.code[0]:q} {params.base:q} --head {input.head:q} --head-type {params.head_type:q} {params.options}"
        " --digests {output.trunk:q} --out {output.file:q} 2>&1 | tee {log:q}"
