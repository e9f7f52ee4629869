# Files from the Hub, pinned to a commit; and records of local files.
# Needs: the network, and for gated repositories a token that huggingface_hub finds (HF_TOKEN, or
# `hf auth login`).
# Refuses a checkpoint that cannot be converted as config.yaml says, before its weights are fetched.
# Makes, under resources/hub/<owner>/<name>/<revision>/: files.json, a list of the commit's files
# and tensors; <name>/, the fetched files, and records/, with one record per verified file;
# head/<name>/, a checkpoint with the head only, and head.json, its record.
# The fetched files are not outputs: Snakemake would delete them when a job fails, and compare
# shards by time.


wildcard_constraints:
    repo="[^/]+/[^/]+",
    revision="[0-9a-f]{40}",


# Snakemake compares files up to 1 MB by content, and larger ones by time. So rules do not read the
# time of what is on this machine: they take this record as an input, and the Snakefile brings it up
# to date while it builds the graph.
rule local_files:
    input:
        code=code("local_files.py"),
        files=ancient(build.fetch.local_files),
    output:
        "resources/local/{place}.json",
    log:
        "logs/local/{place}.log",
    wildcard_constraints:
        place="[^/]+",
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.local_files),
    params:
        code=digest("local_files.py"),
        folder=build.fetch.local_folder,
        names=build.fetch.local_names,
    message:
        "record the content of {wildcards.place}"
    shell:
        "python {input.code[0]:q} {params.folder:q} {params.names:q} --out {output:q}"
        " > {log:q} 2>&1"


checkpoint resolve:
    input:
        code=code("resolve.py"),
        heads=ancient(build.fetch.heads),
    output:
        "resources/hub/{repo}/{revision}/files.json",
    log:
        "logs/hub/{repo}/{revision}/resolve.log",
    priority: 100
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.resolve, beside=True),
        download=1,
    params:
        code=digest("resolve.py"),
        convert=build.fetch.conversions,
        pairs=build.fetch.pairs,
    message:
        "list {wildcards.repo} at {wildcards.revision}"
    shell:
        "python {input.code[0]:q} {wildcards.repo:q} --revision {wildcards.revision}"
        " {params.convert} {params.pairs} --out {output:q} > {log:q} 2>&1"


rule fetch:
    input:
        code=code("fetch.py"),
        listing=ancient("resources/hub/{repo}/{revision}/files.json"),  # a commit does not change
    output:
        "resources/hub/{repo}/{revision}/records/{file}.json",
    log:
        "logs/hub/{repo}/{revision}/{file}.log",
    wildcard_constraints:
        file="[^/]+(/[^/]+)*",
    priority: 50
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.fetch, beside=True),
        download=1,
        sparse=build.fetch.sparse,  # no parameter, which would rerun
    params:
        code=digest("fetch.py"),
        folder=build.fetch.folder,
        head="resources/hub/{repo}/{revision}/head.json",
    message:
        "fetch {wildcards.file} of {wildcards.repo}"
    shell:
        "python {input.code[0]:q} {input.listing:q} {wildcards.file:q} --folder {params.folder:q}"
        " --head {params.head:q} {resources.sparse} --out {output:q} > {log:q} 2>&1"


rule fetch_head:
    input:
        code=code("fetch_head.py"),
        listing=ancient("resources/hub/{repo}/{revision}/files.json"),
    output:
        "resources/hub/{repo}/{revision}/head.json",
    log:
        "logs/hub/{repo}/{revision}/head.log",
    priority: 50
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.fetch_head, beside=True),
        download=1,
    params:
        code=digest("fetch_head.py"),
        folder=build.fetch.head_folder,
        whole=build.fetch.folder,
    message:
        "fetch only the head of {wildcards.repo}"
    shell:
        "python {input.code[0]:q} {input.listing:q} --folder {params.folder:q}"
        " --whole {params.whole:q} --out {output:q} > {log:q} 2>&1"


# snakemake --cores 1 add --config repo=OWNER/NAME
rule add:
    input:
        code=code("add.py"),
    log:
        "logs/add.log",
    conda:
        "../../envs/run.yaml"
    resources:
        **asked(build.needs.small),
    params:
        code=digest("add.py"),
        repo=build.config.repo,
    message:
        "print an entry for config.yaml"
    shell:
        "python {input.code[0]:q} {params.repo:q} 2>&1 | tee {log:q}"
