# A checkpoint from the Hub, pinned to a commit.
# Needs: a model whose source is a repository, and the network.
# Makes: resources/checkpoints/<model>/<revision>/<name>/ and, when all of it is there and hashed, manifest.json beside it.


rule fetch:
    input:
        code=code("fetch.py"),
    output:
        manifest="resources/checkpoints/{model}/{revision}/manifest.json",
    log:
        "logs/fetch/{model}-{revision}.log",
    wildcard_constraints:
        revision="[0-9a-f]{40}",
    conda:
        "../../envs/run.yaml"
    resources:
        download=1,
    params:
        repo=lookup("models/{model}/source/repo", within=config),
        folder=build.checkpoint,
    message:
        "{wildcards.model}: fetch {params.repo} at {wildcards.revision}"
    shell:
        "python {input.code[0]:q} {params.repo:q} --revision {wildcards.revision}"
        " --folder {params.folder:q} --out {output.manifest:q} 2>&1 | tee {log:q}"
