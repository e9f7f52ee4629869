# Proof, and only then the final name.
# Needs: a finished file, the checkpoint (and base) that it is made of, llama-server, prompts.
# Makes: results/<model>/<name>-<variant>.gguf, its report beside it, and results/summary.md over all of them.


rule verify:
    input:
        code=code("verify.py"),
        toolchain="resources/toolchain/stamp.json",
        file=build.candidate,
        base=build.base_if_any,
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
        checkpoint=build.checkpoint,
        prompts=build.prompts,
        options=build.verify_options,
    message:
        "{wildcards.model}: verify {wildcards.variant}"
    shell:
        "python {input.code[0]:q} {input.file:q} --checkpoint {params.checkpoint:q} --tensors {input.recipe:q}"
        " --prompts {params.prompts:q} {params.options} --threads {threads}"
        " --publish {output.file:q} --out {output.report:q} 2>&1 | tee {log:q}"


rule summary:
    input:
        code=code("summary.py"),
        reports=build.reports(),
    output:
        "results/summary.md",
    log:
        "logs/summary.log",
    conda:
        "../../envs/run.yaml"
    message:
        "write the summary of all verified files"
    shell:
        "python {input.code[0]:q} {input.reports:q} --out {output:q} 2>&1 | tee {log:q}"
