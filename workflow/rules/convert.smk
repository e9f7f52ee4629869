# Checkpoint to BF16 GGUF.
# Needs: the checkpoint. Makes: results/<model>/work/convert/<part>.gguf, where part is all, trunk or head.


rule convert:
    input:
        code=code("convert.py"),
        checkpoint=build.checkpoint_inputs,
    output:
        temp("results/{model}/work/convert/{part}.gguf"),
    log:
        "logs/{model}/convert-{part}.log",
    benchmark:
        "benchmarks/{model}/convert-{part}.jsonl"
    wildcard_constraints:
        part="all|trunk|head",
    conda:
        "../../envs/run.yaml"
    params:
        checkpoint=build.checkpoint,
        tokenizer=build.tokenizer_option,
    message:
        "{wildcards.model}: convert the checkpoint ({wildcards.part})"
    shell:
        "python {input.code[0]:q} {params.checkpoint:q} --part {wildcards.part} {params.tokenizer}"
        " --out {output:q} 2>&1 | tee {log:q}"
