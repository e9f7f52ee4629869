# Forecasts a build: bytes to fetch, sizes, disk, memory, time, and what reruns.
# Needs: configuration and tokenizer, which it fetches, and llama-quantize for the types of tensors.
# Makes nothing. It asks another Snakemake what reruns, because a job does not see the graph.


localrules:
    plan,


# snakemake --cores 1 plan
rule plan:
    input:
        code=code("plan.py"),
        toolchain="resources/toolchain/stamp.json",
    log:
        "logs/plan.log",
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.resolve),
    params:
        code=digest("plan.py"),
        models=models,
        options=planning,
    message:
        "forecast the build"
    shell:
        "python {input.code[0]:q} {params.models:q} {params.options} 2>&1 | tee {log:q}"
