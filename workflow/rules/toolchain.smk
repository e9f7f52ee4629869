# llama.cpp's programs and its converter's source.
# Needs: the pinned source archive (envs/llama.cpp.txt) and a C++ compiler, or a directory that has the programs already.
# Makes: resources/toolchain/: bin/, source/ (only when built here) and stamp.json, which says what they are.
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
        " --source resources/toolchain/source --out {output.stamp:q} --jobs {threads} --bin-dir={params.bin_dir:q}"
        " 2>&1 | tee {log:q}"
