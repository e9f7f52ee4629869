# llama.cpp's programs, and llama.cpp's converter.
# Needs: the pinned source archive (envs/llama.cpp.txt) and a C++ compiler, or a folder with
# programs that are already built.
# Makes: resources/toolchain/, with bin/ and two stamps, which describe the build: quantizer.json of
# the programs that only write files, stamp.json of all; and resources/converter/, with source/,
# environment/ (including torch) and stamp.json.
# Rules that run these programs take a stamp as an input: it changes only if they do. The rest
# compiles while others convert and quantize.
# After you replace programs or libraries in `bin_dir`: snakemake --forcerun quantizer.


rule quantizer:
    input:
        code=code("toolchain.py"),
        requirement=ancient("envs/llama.cpp.txt"),
    output:
        stamp="resources/toolchain/quantizer.json",
        programs=multiext("resources/toolchain/bin/llama-", "quantize", "gguf-split"),
    log:
        "logs/quantizer.log",
    benchmark:
        "benchmarks/quantizer.jsonl"
    conda:
        "../../envs/run.yaml"
    threads: build.needs.threads
    resources:
        **asked(build.needs.toolchain, beside=True),
    params:
        code=digest("toolchain.py"),
        pins=pins("envs/llama.cpp.txt"),
        bin_dir=build.config.toolchain.llama_cpp.bin_dir,
        cuda=" --cuda" * build.config.toolchain.llama_cpp.cuda,
    message:
        "quantizer: build llama-quantize (once per user), or link it"
    shell:
        "python {input.code[0]:q} --requirement {input.requirement:q} --bin resources/toolchain/bin"
        " --out {output.stamp:q} --jobs {threads} --bin-dir={params.bin_dir:q}{params.cuda} --quantizer"
        " > {log:q} 2>&1"


rule toolchain:
    input:
        code=code("toolchain.py"),
        requirement=ancient("envs/llama.cpp.txt"),
        quantizer="resources/toolchain/quantizer.json",
    output:
        stamp="resources/toolchain/stamp.json",
        programs=multiext("resources/toolchain/bin/llama-", "server", "imatrix", "perplexity"),
    log:
        "logs/toolchain.log",
    benchmark:
        "benchmarks/toolchain.jsonl"
    conda:
        "../../envs/run.yaml"
    threads: build.needs.threads
    resources:
        **asked(build.needs.toolchain, beside=True),
    params:
        code=digest("toolchain.py"),
        pins=pins("envs/llama.cpp.txt"),
        bin_dir=build.config.toolchain.llama_cpp.bin_dir,
        cuda=" --cuda" * build.config.toolchain.llama_cpp.cuda,
    message:
        "toolchain: build the other programs of llama.cpp (once per user), or link them"
    shell:
        "python {input.code[0]:q} --requirement {input.requirement:q} --bin resources/toolchain/bin"
        " --out {output.stamp:q} --jobs {threads} --bin-dir={params.bin_dir:q}{params.cuda}"
        " > {log:q} 2>&1"


rule converter:
    input:
        code=code("converter.py"),
        requirement=ancient("envs/llama.cpp.txt"),
        lock=ancient("envs/converter.txt"),
    output:
        "resources/converter/stamp.json",
    log:
        "logs/converter.log",
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.converter),
    params:
        code=digest("converter.py"),
        pins=[pins("envs/llama.cpp.txt"), pins("envs/converter.txt")],
    message:
        "converter: set up llama.cpp's converter with its own environment (1 GB)"
    shell:
        "python {input.code[0]:q} --requirement {input.requirement:q} --lock {input.lock:q}"
        " --out {output:q} > {log:q} 2>&1"
