# `make` installs a locked environment into .venv and builds config.yaml; `make help` lists the rest.

PYTHON ?= python3
CORES ?= $(shell $(PYTHON) workflow/scripts/mtpforge/processors.py)
PROFILE ?= default
ifneq ($(PROFILE),default)
PROFILES := $(notdir $(patsubst %/,%,$(wildcard profiles/*/)))
$(if $(filter $(PROFILE),$(PROFILES)),,$(error no profile '$(PROFILE)': profiles/ has $(PROFILES)))
endif

# The variables that each target takes. make refuses one of these if no target of the call takes it.
ENTRY := HEAD IMATRIX PUBLISH TOKENIZER_PRE MODEL MEASURE YES DRY_RUN
TAKEN_BY_quant := REPO TYPE $(ENTRY)
TAKEN_BY_inject := BASE SOURCE REPLACE $(ENTRY)
TAKEN_BY_add := REPO PRESET TYPES $(ENTRY)
TAKEN_BY_publish := DRY_RUN MODELS
TAKEN_BY_all := MODELS
TAKEN_BY_report := MODELS
TAKEN_BY_plan := MODELS
TAKEN_BY_clean-work := YES
TAKEN := $(foreach target,$(or $(MAKECMDGOALS),all),$(TAKEN_BY_$(target)))
OURS := $(foreach target,quant inject add publish plan,$(TAKEN_BY_$(target)))
$(foreach name,$(filter-out $(TAKEN),$(OURS)),$(if $(filter command,$(origin $(name))),$(error \
	make $(or $(MAKECMDGOALS),all) takes no $(name)$(if $(TAKEN),: it takes $(TAKEN)))))

FALSE := 0 n N no No NO false False FALSE
TRUE := 1 y Y yes Yes YES true True TRUE
$(foreach name,MEASURE YES REPLACE DRY_RUN,$(if $(filter-out $(TRUE) $(FALSE),$($(name))),$(error \
	$(name)=$($(name)): set it to 1, or leave it out)))
# $(call set,VARIABLE,WORDS): the words, if the variable is set to 1, yes or true.
set = $(if $(filter $(TRUE),$($(1))),$(2))

LEAN := $(if $(filter lean shards,$(PROFILE)),--lean $(PROFILE))
MACHINES = $(shell sed -n 's/^ *machines: *\([0-9]*\).*/--machines \1/p' profiles/$(PROFILE)/profile.yaml 2> /dev/null)
# `exec`, so that a signal to make reaches the program and not a shell around it.
ACTIVE := exec env PATH="$(CURDIR)/.venv/bin:$$PATH"
PIP_INSTALL := -m pip install -qq --disable-pip-version-check --require-hashes
COMPILE := uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
	--custom-compile-command "make lock"

# PyTorch's CPU build for Linux is on PyTorch's own index, where `make lock` does not look; the ordinary
# wheel brings gigabytes of GPU libraries. Its wheels for Python 3.11 to 3.14 on x86-64 and on ARM:
TORCH_CPU := \
	6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b \
	4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2 \
	3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6 \
	d20fa53ee744502fa4c69818a720b05ca0d37abd055d4f6e66cae155114bc691 \
	84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7 \
	6f307c2c32d764ffc6ff6893b801fad6d4752f3e67966cb8abf1843427c02604 \
	0b8f7d0423027ae8b90c7977c627f3379f325363a08224dffad9b4b2d684a83d \
	ca021f9eb2f8345c83fa03e3a04587308afb8df71bd472670b3ece00df58621c

# Runs a benchmark with little memory, page cache included.
LIMITED ?= systemd-run --user --scope --quiet -p MemoryMax=1G

.DEFAULT_GOAL := all
.PHONY: all quant inject add publish plan report setup setup-test cluster s3 toolchain converter older lint docs test test-faults test-slurm test-staleness golden check-golden upgrade-toolchain check-results fuzz bench bench-recipes lock clean clean-work test-crash help \
	python compiler
.SUFFIXES:

# $(call install,DIRECTORY,LOCK,OPTIONS) makes an environment equal to its lock. Its stamp holds the
# lock and the path, because an environment cannot be moved.
define install
	@{ pwd; cat envs/$(2).txt; } | cmp -s - $(1)/$(2).stamp && $(1)/bin/python -c '' || { \
		{ [ ! -L $(1) ] || { echo "error: $(1) is a link, and its target would be deleted: remove the link" >&2; exit 1; }; } && \
		echo "setting up $(1) from envs/$(2).txt (a minute or so)" && \
		$(PYTHON) -m venv $(3) $(1) && \
		$(1)/bin/python $(PIP_INSTALL) -r envs/$(2).txt && \
		{ pwd; cat envs/$(2).txt; } > $(1)/$(2).stamp; \
	}
endef

# The forecast comes first, and MTPFORGE_FORECAST=told keeps Snakemake from repeating it. It hides its
# errors, because the build explains them better.
FORECAST = ($(ACTIVE) python workflow/scripts/plan.py --totals $(LEAN) $(MACHINES) $(MODELS) 2> /dev/null) || true
# The options with which Snakemake builds only MODELS.
comma := ,
space := $(subst ,, )
CONFIG = $(if $(MODELS),'build=[$(subst $(space),$(comma),$(patsubst %,"%",$(MODELS)))]')
CHOSEN = $(if $(MODELS),--config $(CONFIG))

all: setup ## build everything in config.yaml (the default), or only MODELS="a b"; CORES=N sets the number of cores, PROFILE=lean or shards is for small disks
	@$(FORECAST)
	@$(ACTIVE) MTPFORGE_FORECAST=told snakemake --workflow-profile profiles/$(PROFILE) --cores $(CORES) all $(CHOSEN)

# $(call given,OPTION,VARIABLE) passes a variable on if it is set.
given = $(if $($(2)),$(1) "$($(2))")
# $(call required,VARIABLES,EXAMPLE) stops at a variable that is not set.
required = $(foreach name,$(1),$(if $($(name)),,echo "error: $(name) is missing, as in: $(2)" >&2; exit 2;))
OPTIONS = $(call given,--head,HEAD) $(call given,--imatrix,IMATRIX) $(call given,--publish,PUBLISH) \
	$(call given,--tokenizer-pre,TOKENIZER_PRE) $(call given,--model,MODEL) \
	$(call set,MEASURE,--measure) $(call set,YES,--yes) $(call set,DRY_RUN,--dry-run) \
	--profile $(PROFILE) --cores $(CORES)

quant: setup ## make one type of a model: REPO=OWNER/NAME TYPE=IQ4_XS [HEAD=Q8_0] [IMATRIX=default] [MEASURE=1] [YES=1] [DRY_RUN=1]
	@$(call required,REPO TYPE,make quant REPO=OWNER/NAME TYPE=IQ4_XS)
	@$(ACTIVE) python workflow/scripts/add.py "$(REPO)" --type "$(TYPE)" $(OPTIONS) --build

inject: setup ## put the head of a model into a GGUF: BASE=OWNER/NAME:Q4_K_M or FILE.gguf, SOURCE=OWNER/NAME [REPLACE=1] [YES=1]
	@$(call required,BASE SOURCE,make inject BASE=FILE.gguf SOURCE=OWNER/NAME)
	@$(ACTIVE) python workflow/scripts/add.py "$(SOURCE)" --base "$(BASE)" $(call set,REPLACE,--replace-head) $(OPTIONS) --build

add: setup ## write the entry of a model into config.d: REPO=OWNER/NAME [PRESET=desk|publisher] [TYPES="Q6_K Q4_K_M"] [PUBLISH=YOU/NAME] [MEASURE=1]
	@$(call required,REPO,make add REPO=OWNER/NAME)
	@$(ACTIVE) python workflow/scripts/add.py "$(REPO)" --preset "$(or $(PRESET),desk)" \
		$(if $(TYPES),--types $(foreach type,$(TYPES),"$(type)")) $(OPTIONS) --write

publish: setup ## build, and upload the models that have `publish`; DRY_RUN=1 lists what would be uploaded
	@$(subst --totals,--totals --published,$(FORECAST))
	@$(ACTIVE) MTPFORGE_FORECAST=told snakemake --workflow-profile profiles/$(PROFILE) --cores $(CORES) publish \
		$(or $(call set,DRY_RUN,--config dry_run=true $(CONFIG)),$(CHOSEN))

setup: python compiler ## install the locked environment into .venv
	$(call install,.venv,run,--clear)

setup-test: setup ### also install what the tests need
	$(call install,.venv,test)

cluster: setup ## also install what runs jobs on SLURM (docs/cluster.md)
	$(call install,.venv,cluster)

s3: setup ## also install what uploads to object storage (docs/publishing.md)
	$(call install,.venv,s3)

report: all ## build, then write report.html: the table, pictures of speed, acceptance and errors, run times; MODELS="a b" for some models
	@$(ACTIVE) snakemake --cores $(CORES) plots $(CHOSEN)
	@$(ACTIVE) PYTHONPATH=workflow/scripts snakemake --reporter mtpforge --report-mtpforge-path report.html \
		--report-mtpforge-stylesheet-path workflow/report/report.css plots $(CHOSEN)
	@echo "wrote report.html"

plan: toolchain ## forecast downloads, sizes, disk, memory and time of config.yaml; MODELS="a b" for some models
	@$(ACTIVE) python workflow/scripts/plan.py $(LEAN) $(MACHINES) $(MODELS)

toolchain: setup ## build llama.cpp (once per user; kept in ~/.cache/mtpforge)
	@$(ACTIVE) snakemake --cores $(CORES) toolchain

converter: setup ## install llama.cpp's own converter into resources/converter (with torch, 1 GB)
	@$(ACTIVE) snakemake --cores $(CORES) converter

older: setup ### build the older llama.cpp that some tests need (once per user, about 8 minutes on 2 cores)
	@$(ACTIVE) PYTHONPATH=workflow/scripts python tests/older.py

lint: setup-test ### check style and types
	@$(ACTIVE) ruff check .
	@$(ACTIVE) ruff format --check .
	@$(ACTIVE) mypy
	@$(ACTIVE) snakefmt --check Snakefile workflow/rules
	@$(ACTIVE) snakemake --lint

docs: setup ### write the generated parts of docs/
	@$(ACTIVE) python docs/generate.py

test: lint ### lint, then run all tests, CORES of them at a time
	@$(ACTIVE) pytest -m "not alone" -n $(CORES) --maxprocesses 8 --dist loadfile --no-loadscope-reorder
	@$(ACTIVE) pytest -m alone

test-faults: setup-test toolchain ### fill disks and fail system calls under every writer, one by one (an hour)
	@$(ACTIVE) MTPFORGE_FAULTS=all pytest tests/end_to_end/test_faults.py

test-slurm: setup-test toolchain ### start a SLURM of two nodes, and disturb it (6 minutes; needs root, and SLURM from Debian's packages)
	@command -v slurmctld > /dev/null || apt-get install -qq -y --no-install-recommends slurmctld slurmd slurm-client munge
	$(call install,.venv-cluster,cluster,--clear)
	@$(ACTIVE) MTPFORGE_SLURM=all pytest -rs tests/workflow/test_slurm.py

test-staleness: toolchain setup-test ### change each kind of input and compare all results with those of a build from nothing (an hour)
	@$(ACTIVE) PYTHONPATH=workflow/scripts python tests/staleness.py

golden: toolchain converter ### rewrite the golden digests with llama.cpp's own converter
	@resources/converter/environment/bin/python tests/golden/make.py

check-golden: toolchain converter ### check the golden digests against llama.cpp's own converter
	@resources/converter/environment/bin/python tests/golden/make.py --check

upgrade-toolchain: setup ### pin another llama.cpp and print what changes (docs/upgrade.md): VERSION=11434.0.0
	@$(ACTIVE) python tests/golden/pin.py "$(VERSION)"
	@$(MAKE) golden

check-results: setup ## check a results folder, local or downloaded: FOLDER=...
	@$(ACTIVE) python workflow/scripts/check_results.py "$(FOLDER)"

fuzz: setup-test ### fuzz the parsers of untrusted files, SECONDS=600 each (Linux x86-64)
	@for target in gguf safetensors imatrix; do \
		$(ACTIVE) python tests/fuzz/fuzz.py $$target --seconds $(or $(SECONDS),600) --seed $$$$ || exit 1; done

bench: toolchain ### benchmark conversion, injection, quantization, disk and the cost of types (25 GB in resources/bench, 55 minutes)
	@$(ACTIVE) python bench/conversion.py
	@$(ACTIVE) python bench/injection.py
	@$(ACTIVE) python bench/quantization.py
	@$(ACTIVE) python bench/lean.py
	@$(ACTIVE) python bench/costs.py
	@$(ACTIVE) $(LIMITED) python bench/io_volume.py

bench-recipes: toolchain ### compare recipes found for a size with llama.cpp's own mixtures (5 minutes)
	@$(ACTIVE) python bench/recipes.py

lock: python ### resolve envs/*.in into envs/*.txt; UPGRADE=--upgrade takes the newest versions
	@$(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/python -m pip install -qq --disable-pip-version-check uv==0.13.9
	@for name in run test cluster s3 converter; do .venv-lock/bin/$(COMPILE) $(UPGRADE) envs/$$name.in -o envs/$$name.txt || exit 1; done
	@awk '/^torch==[0-9.]+ \\$$/ { \
			printf $$1 "+cpu ; sys_platform == \047linux\047"; \
			split("$(TORCH_CPU)", hashes); \
			for (i = 1; i in hashes; i++) printf " \\\n    --hash=sha256:" hashes[i]; \
			print ""; \
			$$0 = $$1 " ; sys_platform != \047linux\047 \\" } \
		{ print }' envs/converter.txt > envs/converter.txt.part
	@mv envs/converter.txt.part envs/converter.txt

test-crash: setup-test ### kill a build at 48 points of all stages, and go on (half an hour); KILLS=N SEED=N
	@$(ACTIVE) KILLS=$(or $(KILLS),48) SEED=$(or $(SEED),1) pytest -s tests/workflow/test_kills.py

clean-work: setup ## list what unfinished and finished builds leave in work/, with sizes; YES=1 deletes it
	@$(ACTIVE) python workflow/scripts/clean_work.py $(call set,YES,--yes)

clean: ## delete results/, but keep downloads and the toolchain
	rm -rf results

help: ## list these targets
	@echo "To make and publish GGUFs:"
	@awk -F ':.* ## ' '/^[a-z0-9-]+:.* ## / { printf "make %-17s %s\n", $$1, $$2 }' Makefile
	@echo "To develop mtpforge:"
	@awk -F ':.* ### ' '/^[a-z0-9-]+:.* ### / { printf "make %-17s %s\n", $$1, $$2 }' Makefile

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
		echo "error: mtpforge needs Python 3.11 or newer, and '$(PYTHON)' is older or missing: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
		echo "error: $(PYTHON) cannot make environments: install its venv module (Debian/Ubuntu: apt install python3-venv)" >&2; \
		exit 1; }

# toolchain.py checks this too; here it fails before anything is downloaded. Programs that are there
# need none.
compiler:
	@[ -e resources/toolchain/stamp.json ] || grep -qs "^[^#]*bin_dir: *[\"']\?[^ \"'}]" config.yaml || \
		grep -qs "$$(sed -n 's/.*--hash=sha256://p' envs/llama.cpp.txt)" \
			"$${MTPFORGE_CACHE:-$${XDG_CACHE_HOME:-$$HOME/.cache}/mtpforge}"/llama.cpp/*/stamp.json || \
		$${CXX:-c++} --version > /dev/null 2>&1 || g++ --version > /dev/null 2>&1 || clang++ --version > /dev/null 2>&1 || { \
		echo "error: no C++ compiler: install g++ (Debian/Ubuntu: apt install g++; Fedora: dnf install gcc-c++;" \
			"macOS: xcode-select --install)" >&2; exit 1; }
