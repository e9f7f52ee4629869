# llama.cpp's programs, and llama.cpp's converter.
# Needs: the pinned source archive (envs/llama.cpp.txt) and a C++ compiler, or a folder with
# programs that are already built.
# Makes: resources/toolchain/, with bin/, a stamp of each program, which describes its build, and
# stamp.json of all; and resources/converter/, with source/, environment/ (including torch) and
# stamp.json.
# Rules take the stamps of the programs that they run as an input: a stamp changes only if its
# program does. So quantization need not wait for llama-server, which compiles longest. Where a file
# exceeds the memory, llama-server is asked for GPUs before llama-imatrix or llama-perplexity runs.
# After you replace programs or libraries in `bin_dir`: snakemake --cores all --forcerun program.


# Compiled one after the other, because each takes all processors; linked in any order.
PROGRAMS = [f"llama-{name}" for name in "quantize gguf-split server imatrix perplexity".split()]


stamps = lambda *programs: [f"resources/toolchain/{name}.json" for name in programs]

compiled_before = lambda program: (
    [] if build.config.toolchain.llama_cpp.bin_dir else PROGRAMS[: PROGRAMS.index(program)][-1:]
)


rule program:
    input:
        code=code("toolchain.py"),
        requirement=ancient("envs/llama.cpp.txt"),
        before=lambda wildcards: stamps(*compiled_before(wildcards.program)),
    output:
        stamp="resources/toolchain/{program}.json",
        program="resources/toolchain/bin/{program}",
    log:
        "logs/toolchain/{program}.log",
    benchmark:
        "benchmarks/toolchain/{program}.jsonl"
    wildcard_constraints:
        program="|".join(PROGRAMS),
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
        "toolchain: {wildcards.program}, built once per user"
    shell:
        "python {input.code[0]:q} --requirement {input.requirement:q} --bin resources/toolchain/bin"
        " --out {output.stamp:q} --jobs {threads} --bin-dir={params.bin_dir:q}{params.cuda}"
        " --program {wildcards.program} > {log:q} 2>&1"


rule toolchain:
    input:
        code=code("toolchain.py"),
        requirement=ancient("envs/llama.cpp.txt"),
        programs=stamps(*PROGRAMS),
    output:
        "resources/toolchain/stamp.json",
    log:
        "logs/toolchain/all.log",
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.small),
    params:
        code=digest("toolchain.py"),
    message:
        "toolchain: describe the programs of llama.cpp"
    shell:
        "python {input.code[0]:q} --requirement {input.requirement:q} --bin resources/toolchain/bin"
        " --of {input.programs:q} --out {output:q} > {log:q} 2>&1"


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
