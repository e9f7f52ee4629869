# Files of the Hub, pinned to a commit.
# Needs: the network, and for what is gated a token that huggingface_hub finds (HF_TOKEN, or `hf auth login`).
# Makes, under resources/hub/<owner>/<name>/<revision>/: files.json, what the commit holds; <name>/, the files themselves, each
# with a record under records/ once its content is right; and head/<name>/, a checkpoint of the head alone, with head.json.
# The files themselves are no outputs: Snakemake would delete what a failed job has fetched, and compare shards by their time.


wildcard_constraints:
    repo="[^/]+/[^/]+",
    revision="[0-9a-f]{40}",


checkpoint resolve:
    input:
        code=code("resolve.py"),
    output:
        "resources/hub/{repo}/{revision}/files.json",
    log:
        "logs/hub/{repo}/{revision}/resolve.log",
    conda:
        "../../envs/run.yaml"
    resources:
        download=1,
    message:
        "list {wildcards.repo} at {wildcards.revision}"
    shell:
        "python {input.code[0]:q} {wildcards.repo:q} --revision {wildcards.revision} --out {output:q} 2>&1 | tee {log:q}"


rule fetch:
    input:
        code=code("fetch.py"),
        listing=ancient("resources/hub/{repo}/{revision}/files.json"),  # a commit does not change
    output:
        "resources/hub/{repo}/{revision}/records/{file}.json",
    log:
        "logs/hub/{repo}/{revision}/{file}.log",
    wildcard_constraints:
        file="[^/]+",
    conda:
        "../../envs/run.yaml"
    resources:
        download=1,
    params:
        folder=build.fetched,
        head="resources/hub/{repo}/{revision}/head.json",
    message:
        "fetch {wildcards.file} of {wildcards.repo}"
    shell:
        "python {input.code[0]:q} {input.listing:q} {wildcards.file:q} --folder {params.folder:q} --head {params.head:q}"
        " --out {output:q} 2>&1 | tee {log:q}"


rule fetch_head:
    input:
        code=code("fetch_head.py"),
        listing=ancient("resources/hub/{repo}/{revision}/files.json"),
    output:
        "resources/hub/{repo}/{revision}/head.json",
    log:
        "logs/hub/{repo}/{revision}/head.log",
    conda:
        "../../envs/run.yaml"
    resources:
        download=1,
    params:
        folder=build.fetched_head,
        whole=build.fetched,
    message:
        "fetch the head of {wildcards.repo}, and no other weights"
    shell:
        "python {input.code[0]:q} {input.listing:q} --folder {params.folder:q} --whole {params.whole:q}"
        " --out {output:q} 2>&1 | tee {log:q}"


# snakemake --cores 1 add --config repo=OWNER/NAME
rule add:
    input:
        code=code("add.py"),
    log:
        "logs/add.log",
    conda:
        "../../envs/run.yaml"
    params:
        repo=lookup("repo", within=config, default=""),
    shell:
        "python {input.code[0]:q} {params.repo:q} 2>&1 | tee {log:q}"
