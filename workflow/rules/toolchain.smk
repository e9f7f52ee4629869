# llama.cpp's programs, and its own converter.
# Needs: the pinned source archive (envs/llama.cpp.txt) and a C++ compiler, or a directory that has the programs already.
# Makes: resources/toolchain/: bin/ and stamp.json, which says what they are; resources/converter/: source/, environment/ (with
# torch) and stamp.json.
# Rules that run a program take the stamp as their input: it changes when the toolchain does, and a rebuild of the same
# toolchain changes nothing. After replacing programs in `bin_dir`: snakemake --forcerun toolchain.


rule toolchain:
    input:
        code=code("toolchain.py"),
        requirement="envs/llama.cpp.txt",
    output:
        stamp="resources/toolchain/stamp.json",
        programs=multiext("resources/toolchain/bin/llama-", "quantize", "server", "gguf-split", "imatrix", "perplexity"),
    log:
        "logs/toolchain.log",
    benchmark:
        "benchmarks/toolchain.jsonl"
    conda:
        "../../envs/run.yaml"
    threads: 8
    params:
        bin_dir=lookup("toolchain/llama_cpp/bin_dir", within=config, default=""),
    message:
        "toolchain: llama.cpp, built (once per user) or linked"
    shell:
        "python {input.code[0]:q} --requirement {input.requirement:q} --bin resources/toolchain/bin"
        " --out {output.stamp:q} --jobs {threads} --bin-dir={params.bin_dir:q}"
        " 2>&1 | tee {log:q}"


rule converter:
    input:
        code=code("converter.py"),
        requirement="envs/llama.cpp.txt",
        lock="envs/converter.txt",
    output:
        "resources/converter/stamp.json",
    log:
        "logs/converter.log",
    conda:
        "../../envs/run.yaml"
    message:
        "converter: llama.cpp's own, with an environment of its own (1 GB)"
    shell:
        "python {input.code[0]:q} --requirement {input.requirement:q} --lock {input.lock:q} --out {output:q} 2>&1 | tee {log:q}"
