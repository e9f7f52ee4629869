# What a published file is worth: speed and acceptance over n_max, memory, distance from BF16.
# Needs: a published file and its report, so that only what is verified is measured; llama-server, llama-perplexity, prompts, and
# the model's text if it names one.
# Makes: results/<model>/measure/<name>-<variant>.json, and results/summary.md over all files. results/<model>/work/logits/ has what
# BF16 predicts for the text, once per model.
# A measurement takes all cores, so that no other job of the same run disturbs it.


rule reference_logits:
    input:
        code=code("reference_logits.py"),
        toolchain="resources/toolchain/stamp.json",
        model=ancient(build.unquantized_file),
        digests=build.unquantized_digests,
        text=build.measured_text,
    output:
        temp("results/{model}/work/logits/reference.bin"),
    log:
        "logs/{model}/reference-logits.log",
    benchmark:
        "benchmarks/{model}/reference-logits.jsonl"
    conda:
        "../../envs/run.yaml"
    threads: 64
    params:
        chunks=build.chunks,
    message:
        "{wildcards.model}: what BF16 predicts for {input.text}"
    shell:
        "python {input.code[0]:q} {input.model:q} --text {input.text:q} --chunks {params.chunks} --threads {threads}"
        " --out {output:q} 2>&1 | tee {log:q}"


rule measure:
    input:
        code=code("measure.py"),
        toolchain="resources/toolchain/stamp.json",
        file=ancient(build.verified),  # its digests are compared by content, and what else was checked changes no measurement
        report=ancient(build.report),
        digests=build.digests,
        prompts=build.prompt_files,
        text=build.measured_text,
        logits=build.measured_logits,
    output:
        "results/{model}/measure/{base}-{variant}.json",
    log:
        "logs/{model}/measure-{base}-{variant}.log",
    benchmark:
        "benchmarks/{model}/measure-{base}-{variant}.jsonl"
    conda:
        "../../envs/run.yaml"
    threads: 64
    params:
        prompts=build.prompts,
        options=build.measure_options,
    message:
        "{wildcards.model}: measure {wildcards.variant}"
    shell:
        "python {input.code[0]:q} {input.file:q} --prompts {params.prompts:q} {params.options} --threads {threads}"
        " --out {output:q} 2>&1 | tee {log:q}"


rule summary:
    input:
        code=code("summary.py"),
        reports=build.reports(),
        measurements=build.measurements(),
    output:
        "results/summary.md",
    log:
        "logs/summary.log",
    conda:
        "../../envs/run.yaml"
    message:
        "write the summary of all verified and measured files"
    shell:
        "python {input.code[0]:q} {input.reports:q} --measurements {input.measurements:q}"
        " --out {output:q} 2>&1 | tee {log:q}"
