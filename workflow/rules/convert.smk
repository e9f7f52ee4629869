# From a checkpoint to a BF16 GGUF, with mtpforge's converter or llama.cpp's own.
# Needs: the checkpoint.
# Makes: results/<model>/work/convert/<part>.gguf (part: all, trunk, head, draft or mmproj), and for
# `head_from` work/donors/<checkpoint>.gguf, another checkpoint's head; the digests of the tensors
# of each beside it. A part that is published in several files is the folder work/split/<part>.
# Rules that read the GGUF take its digests as an input, and the GGUF itself as `ancient`: Snakemake
# compares small files by content but large ones by time, and the published BF16 file is a hard link
# to this one.
# The resource `free` is options that free shards (profiles/lean), and `program` the one that knows
# them: parameters would rerun. For the same reason `ready` is a checkpoint and no input: a conversion
# that also quantizes (profiles/shards) waits for it.


checkpoint ready:
    input:
        programs=stamps("llama-quantize"),
        imatrix=build.convert.matrices,
    output:
        "results/{model}/work/ready.txt",
    log:
        "logs/{model}/ready.log",
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.small),
    message:
        "{wildcards.model}: all is there to quantize while converting"
    shell:
        "touch {output:q} 2> {log:q}"


rule convert:
    input:
        code=code("convert.py"),
        checkpoint=build.fetch.conversion_inputs,
    output:
        file=temp("results/{model}/work/convert/{part}.gguf"),
        digests="results/{model}/work/convert/{part}.json",
    log:
        "logs/{model}/convert-{part}.log",
    benchmark:
        "benchmarks/{model}/convert-{part}.jsonl"
    wildcard_constraints:
        model=build.convert.models("mtpforge"),
        part="all|trunk|head|draft",
    conda:
        "../../envs/run.yaml"
    threads: build.needs.threads
    resources:
        **asked(build.needs.convert),
        program=build.convert.program,
        free=build.convert.free,
    params:
        code=digest("convert.py"),
        pins=pins("envs/run.txt"),  # gguf and tokenizers decide metadata
        checkpoint=build.fetch.checkpoint,
        options=build.convert.options,
        norms=build.convert.norms_option,
        recorded=build.fetch.recorded_option,
    message:
        "{wildcards.model}: convert the checkpoint ({wildcards.part})"
    shell:
        "python {resources.program:q} {params.checkpoint:q} --part {wildcards.part}"
        " {params.options} {params.norms} {params.recorded} --resume {params.code}"
        " {resources.free} --threads {threads} --out {output.file:q} --digests {output.digests:q}"
        " > {log:q} 2>&1"


# As it is published, in several files: a BF16 variant with `split` needs no second copy then.
use rule convert as convert_split with:
    output:
        file=temp(directory("results/{model}/work/split/{part}")),
        digests="results/{model}/work/split/{part}.json",
    log:
        "logs/{model}/convert-split-{part}.log",
    benchmark:
        "benchmarks/{model}/convert-{part}.jsonl"
    wildcard_constraints:
        model=build.convert.models("mtpforge"),
        part="all|trunk",
    params:
        code=digest("convert.py"),
        pins=pins("envs/run.txt"),
        checkpoint=build.fetch.checkpoint,
        options=build.convert.split_options,
        norms=build.convert.norms_option,
        recorded=build.fetch.recorded_option,
    message:
        "{wildcards.model}: convert the checkpoint ({wildcards.part}), in several files"


rule convert_donor:
    input:
        code=code("convert.py"),
        checkpoint=build.fetch.donor_inputs,
    output:
        file=temp("results/{model}/work/donors/{donor}.gguf"),
        digests="results/{model}/work/donors/{donor}.json",
    log:
        "logs/{model}/convert-donor-{donor}.log",
    benchmark:
        "benchmarks/{model}/convert-donor-{donor}.jsonl"
    wildcard_constraints:
        model=build.convert.models("mtpforge"),
        donor="[^/]+",
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.donor),
    params:
        code=digest("convert.py"),
        pins=pins("envs/run.txt"),  # gguf and tokenizers decide metadata
        checkpoint=build.fetch.donor,
        norms=build.convert.norms_option,
        recorded=build.fetch.donor_recorded_option,
    message:
        "{wildcards.model}: convert the head of {params.checkpoint}"
    shell:
        "python {input.code[0]:q} {params.checkpoint:q} --part head"
        " {params.norms} {params.recorded} --out {output.file:q}"
        " --digests {output.digests:q} > {log:q} 2>&1"


rule convert_upstream:
    input:
        code=code("convert_upstream.py"),
        checkpoint=build.fetch.upstream_inputs,
        converter="resources/converter/stamp.json",
    output:
        file=temp("results/{model}/work/convert/{part}.gguf"),
        digests="results/{model}/work/convert/{part}.json",
    log:
        "logs/{model}/convert-{part}.log",
    benchmark:
        "benchmarks/{model}/convert-{part}.jsonl"
    wildcard_constraints:
        model=build.convert.models("llama.cpp"),
        part="all|trunk|draft",
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.convert_upstream),
    params:
        code=digest("convert_upstream.py"),
        checkpoint=build.fetch.upstream_checkpoint,
        tokenizer=build.convert.tokenizer_option,
        recorded=build.fetch.upstream_recorded_option,
    message:
        "{wildcards.model}: convert the checkpoint ({wildcards.part}) with llama.cpp's converter"
    shell:
        "python {input.code[0]:q} {params.checkpoint:q} --part {wildcards.part}"
        " {params.tokenizer} {params.recorded} --log {log:q} --out {output.file:q}"
        " --digests {output.digests:q} >> {log:q} 2>&1"


rule convert_donor_upstream:
    input:
        code=code("convert_upstream.py"),
        checkpoint=build.fetch.donor_inputs,
        converter="resources/converter/stamp.json",
    output:
        file=temp("results/{model}/work/donors/{donor}.gguf"),
        digests="results/{model}/work/donors/{donor}.json",
    log:
        "logs/{model}/convert-donor-{donor}.log",
    benchmark:
        "benchmarks/{model}/convert-donor-{donor}.jsonl"
    wildcard_constraints:
        model=build.convert.models("llama.cpp"),
        donor="[^/]+",
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.convert_upstream),
    params:
        code=digest("convert_upstream.py"),
        checkpoint=build.fetch.donor,
        tokenizer=build.convert.tokenizer_option,
        recorded=build.fetch.donor_recorded_option,
    message:
        "{wildcards.model}: convert {params.checkpoint} with llama.cpp's converter, for its head"
    shell:
        "python {input.code[0]:q} {params.checkpoint:q} {params.tokenizer} {params.recorded}"
        " --log {log:q}"
        " --out {output.file:q} --digests {output.digests:q} >> {log:q} 2>&1"


rule mmproj:
    input:
        code=code("convert_upstream.py"),
        checkpoint=build.fetch.checkpoint_inputs,
        converter="resources/converter/stamp.json",
    output:
        file=temp("results/{model}/work/convert/mmproj.gguf"),
        digests="results/{model}/work/convert/mmproj.json",
    log:
        "logs/{model}/convert-mmproj.log",
    benchmark:
        "benchmarks/{model}/convert-mmproj.jsonl"
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.convert_upstream),
    params:
        code=digest("convert_upstream.py"),
        checkpoint=build.fetch.checkpoint,
        recorded=build.fetch.recorded_option,
    message:
        "{wildcards.model}: convert the vision tower with llama.cpp's converter"
    shell:
        "python {input.code[0]:q} {params.checkpoint:q} --part mmproj"
        " {params.recorded} --log {log:q} --out {output.file:q}"
        " --digests {output.digests:q} >> {log:q} 2>&1"
