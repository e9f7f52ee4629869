# Measures published files: speed and acceptance by draft length, memory, distance from BF16.
# Needs: a verified file and its report, llama-server, llama-perplexity, prompts, and the model's
# text if it has one.
# Makes: results/<model>/measure/<name>-<variant>.json, results/summary.md with all files, and
# once per model the BF16 logits on the text, in results/<model>/work/logits/; and
# work/others/<place>.json for each file under `compare`, from the same logits.
# A measurement takes all processors and downloads, so that no other job runs beside it.


rule reference_logits:
    input:
        code=code("reference_logits.py"),
        programs=stamps("llama-server", "llama-perplexity"),
        model=ancient(build.convert.unquantized_file),
        digests=build.convert.unquantized_digests,
        text=ancient(build.measure.text),
        text_record=build.measure.text_records,
    output:
        file=temp("results/{model}/work/logits/reference.bin"),
        digest="results/{model}/work/logits/reference.json",
    log:
        "logs/{model}/reference-logits.log",
    benchmark:
        "benchmarks/{model}/reference-logits.jsonl"
    conda:
        "../../envs/run.yaml"
    threads: build.needs.threads
    resources:
        **asked(build.needs.logits),
        gpu=build.needs.gpu,
    params:
        code=digest("reference_logits.py"),
        chunks=build.measure.chunks,
    message:
        "{wildcards.model}: BF16 logits on {input.text}"
    shell:
        "python {input.code[0]:q} {input.model:q} --text {input.text:q} --chunks {params.chunks}"
        " --recorded {input.digests:q} --text-recorded {input.text_record:q} --threads {threads}"
        " --digest {output.digest:q} --out {output.file:q} > {log:q} 2>&1"


# Whatever decides a measurement beside the file. A job of its own, because `measure` waits for
# `verify`: Snakemake looks at no change of a job below one that reruns, and the report says nothing
# of how to measure.
rule measuring:
    input:
        records=build.measure.records,
    output:
        "results/{model}/work/measuring.json",
    log:
        "logs/{model}/measuring.log",
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.small),
    params:
        settings=build.measure.decisive,
    message:
        "{wildcards.model}: record the measurement settings"
    shell:
        "{{ printf '%s\\n' {params.settings:q} && cat /dev/null {input.records:q}; }}"
        " > {output:q} 2> {log:q}"


rule measure:
    input:
        code=code("measure.py"),
        programs=stamps("llama-server", "llama-perplexity"),
        file=ancient(build.measure.file),  # its digests are compared by content
        report=ancient(build.measure.report),  # only verified files are measured
        settings="results/{model}/work/measuring.json",
        digests=build.verify.digests,
        prompts=build.measure.prompt_files,
        text=ancient(build.measure.text),
        records=build.measure.records,
        logits=ancient(build.measure.logits),
        logits_digest=build.measure.logits_digests,
    output:
        "results/{model}/measure/{base}-{variant}.json",
    log:
        "logs/{model}/measure-{base}-{variant}.log",
    benchmark:
        "benchmarks/{model}/measure-{base}-{variant}.jsonl"
    priority: 2 * build.publish.priority
    conda:
        "../../envs/run.yaml"
    threads: build.needs.threads
    resources:
        **asked(build.needs.measure, alone=True),
        download=lambda _: 1000 if workflow.local_exec else 0,  # all, so that none runs beside it
        gpu=build.needs.gpu,
    params:
        code=digest("measure.py"),
        prompts=build.measure.prompts,
        options=build.measure.options,
    message:
        "{wildcards.model}: measure {wildcards.variant}"
    shell:
        "python {input.code[0]:q} {input.file:q} --prompts {params.prompts:q} {params.options}"
        " --threads {threads} --out {output:q} > {log:q} 2>&1"


# <place> is the name of the file, followed by part of the sha256 of its path. What was fetched is
# deleted once it is measured, with its record, so that it is fetched again if this job reruns.
rule measure_other:
    input:
        code=code("measure_other.py"),
        programs=stamps("llama-server", "llama-perplexity"),
        records=build.measure.other_inputs,
        model=ancient(build.convert.unquantized_file),
        digests=build.convert.unquantized_digests,
        logits=ancient("results/{model}/work/logits/reference.bin"),
        logits_digest="results/{model}/work/logits/reference.json",
    output:
        "results/{model}/work/others/{place}.json",
    log:
        "logs/{model}/measure-other-{place}.log",
    benchmark:
        "benchmarks/{model}/measure_other-{place}.jsonl"
    wildcard_constraints:
        place="[^/]+",
    conda:
        "../../envs/run.yaml"
    threads: build.needs.threads
    resources:
        **asked(build.needs.measure_other),
        gpu=build.needs.gpu,
    params:
        code=digest("measure_other.py"),
        file=build.measure.other_file,
        options=build.measure.other_options,
    message:
        "{wildcards.model}: measure {params.file}, which was not made here"
    shell:
        "python {input.code[0]:q} {params.file:q} --like {input.model:q}"
        " --reference-logits {input.logits:q} --logits-recorded {input.logits_digest:q}"
        " {params.options} --threads {threads} --out {output:q} > {log:q} 2>&1"


rule summary:
    input:
        code=code("summary.py"),
        reports=build.reports(),
        measurements=build.measurements(),
        compared=build.search.all_compared(),
        others=build.measure.all_others(),
        coverages=build.quantize.coverages(),
    output:
        "results/summary.md",
    log:
        "logs/summary.log",
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.small),
    params:
        code=digest("summary.py"),
        files=build.summarized(),
    message:
        "summarize all verified and measured files"
    shell:
        "python {input.code[0]:q} {params.files} --out {output:q} > {log:q} 2>&1"
