# The commands of the project. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
ARGS ?=
SITE ?= aisha-webhook
PLAYBOOK = PATH="$(CURDIR)/.venv/bin:$$PATH" ansible-playbook

.PHONY: help up check update verify rollback status unlock vault prune send down logs shell backup restore bundle doctor test test-fresh test-browser test-cluster bench-intake bench-worker bench-table bench-console bench-rollout soak lint sbom audit unit lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

up: ## build, ship, start and prove the whole stack (ARGS="-i inventory/production" for a real site; BUNDLE=FILE without internet)
	@BUNDLE="$(BUNDLE)" scripts/up.sh $(ARGS)

check: ## what `make up` would do, without doing it
	@scripts/controller.sh requirements.txt
	@$(PLAYBOOK) site.yml --check --diff $(ARGS)

update: ## quick update: build, push, replace what differs, verify
	@scripts/controller.sh requirements.txt
	@$(PLAYBOOK) site.yml --tags update $(ARGS)

verify: ## prove the standing stack: health, registry, a signed probe to the last backend
	@scripts/controller.sh requirements.txt
	@$(PLAYBOOK) site.yml --tags verify $(ARGS)

rollback: ## back to the release that served before (ARGS="-e release=r-…", ARGS="-e list=true" lists them)
	@scripts/controller.sh requirements.txt
	@$(PLAYBOOK) playbooks/rollback.yml $(ARGS)

status: ## what runs where, its health and its release
	@scripts/controller.sh requirements.txt
	@$(PLAYBOOK) playbooks/status.yml $(ARGS)

unlock: ## take the deployment lock away from a run that is known to be dead (ARGS="-e lock_break=any"; docs/releases.md)
	@scripts/controller.sh requirements.txt
	@$(PLAYBOOK) playbooks/unlock.yml $(ARGS)

vault: ## write the encrypted vault of inventory/production, with every secret generated (docs/production.md)
	@scripts/controller.sh requirements.txt
	@PATH="$(CURDIR)/.venv/bin:$$PATH" python scripts/vault.py $(ARGS)

prune: ## remove images that no kept release needs, from hosts and registry
	@scripts/controller.sh requirements.txt
	@$(PLAYBOOK) playbooks/prune.yml $(ARGS)

send: ## send a signed delivery to the local stack (SHAPE=portrait-ok, ARGS="--count 3")
	@scripts/send.sh "$(or $(SHAPE),portrait-ok)" $(ARGS)

down: ## take the local stack down; asks, and keeps the data (ARGS="-e teardown_data=true" removes it too)
	@scripts/controller.sh requirements.txt
	@$(PLAYBOOK) playbooks/teardown.yml $(ARGS)

logs: ## what containers of the local stack say (SERVICE=api-1, ARGS="--follow --since 10m"; docs/operations.md)
	@docker compose --project-name $(SITE) --file /opt/$(SITE)/current/docker-compose.webhook.prod.yml logs --tail 100 $(ARGS) $(SERVICE)

shell: ## a shell in an instance of the local stack, or one command (SERVICE=worker, CMD="webhook-api health")
	@docker exec $(if $(CMD),,--interactive --tty) $(SITE)-$(or $(SERVICE),api-1) $(or $(CMD),bash)

backup: ## a backup of the site while it serves (ARGS="-e backup_passphrase_file=…"; docs/backup.md)
	@scripts/controller.sh requirements.txt
	@$(PLAYBOOK) playbooks/backup.yml $(ARGS)

restore: ## a backup into an empty place, or over a standing stack when told so (docs/backup.md)
	@scripts/controller.sh requirements.txt
	@$(PLAYBOOK) playbooks/restore.yml $(if $(BUNDLE),-e bundle=$(abspath $(BUNDLE))) $(ARGS)

bundle: ## images, wheels and the project in one file, for sites without internet (docs/air-gapped.md)
	@scripts/controller.sh requirements.txt
	@$(PLAYBOOK) playbooks/bundle.yml $(ARGS)

doctor: ## try everything that docs/troubleshooting.md names; cause and remedy of what is wrong
	@scripts/controller.sh requirements.txt
	@$(PLAYBOOK) playbooks/doctor.yml $(ARGS)

test: ## all tests, from linters to a delivery through a stack of their own
	@scripts/test.sh

test-fresh: ## the README's two commands on bare Debian 12 and 13 hosts
	@scripts/test-fresh.sh

test-browser: ## the console in Debian's Chromium: journeys, keyboard, axe-core (SCREENSHOTS=docs/screenshots keeps pictures)
	@SCREENSHOTS="$(SCREENSHOTS)" scripts/test.sh browser

test-cluster: ## sites of several hosts, each with an engine of its own, over real SSH
	@scripts/test.sh cluster

bench-intake: ## how fast deliveries are taken, beside a reference, in one run (ARGS="--rounds 5")
	@scripts/controller.sh requirements.txt requirements-dev.txt webhook/requirements.txt bench/requirements.txt
	@PATH="$(CURDIR)/.venv/bin:$$PATH" PYTHONPATH=webhook:. .venv/bin/python -m bench.intake $(ARGS)

bench-worker: ## how fast the worker drains the inbox, with an empty table and a full one
	@scripts/controller.sh requirements.txt requirements-dev.txt webhook/requirements.txt
	@PATH="$(CURDIR)/.venv/bin:$$PATH" PYTHONPATH=webhook:. .venv/bin/python -m bench.worker $(ARGS)

bench-table: ## the inbox at ten million rows beside a small one (a quarter of an hour, 25 GB; ARGS="--rows 1000000")
	@scripts/controller.sh requirements.txt requirements-dev.txt webhook/requirements.txt
	@PATH="$(CURDIR)/.venv/bin:$$PATH" PYTHONPATH=webhook:. .venv/bin/python -m bench.table $(ARGS)

bench-console: ## every page of the console at ten million deliveries; fails above 100 ms (a quarter of an hour, 25 GB; ARGS="--rows 1000000")
	@scripts/controller.sh requirements.txt requirements-dev.txt webhook/requirements.txt
	@PATH="$(CURDIR)/.venv/bin:$$PATH" PYTHONPATH=webhook:. .venv/bin/python -m bench.console $(ARGS)

bench-rollout: ## update, rollback, verify and a run without changes beside the old procedure, under load (ARGS=--hosts: a further host)
	@scripts/controller.sh requirements.txt requirements-dev.txt webhook/requirements.txt
	@PATH="$(CURDIR)/.venv/bin:$$PATH" PYTHONPATH=webhook:. .venv/bin/python -m bench.rollout $(ARGS)

soak: ## the fault scenarios in full: hundreds of kills, a quarter of an hour and more (docs/receiver/proof.md)
	@scripts/soak.sh $(ARGS)

lint: ## ruff, mypy, yamllint, ansible-lint, pip-audit where it can ask
	@scripts/controller.sh requirements.txt requirements-dev.txt webhook/requirements.txt
	@scripts/lint.sh

sbom: ## what the running images are made of: CycloneDX documents in sbom/, and a list
	@scripts/controller.sh requirements.txt
	@$(PLAYBOOK) playbooks/sbom.yml $(ARGS)

audit: ## known vulnerabilities of everything that the requirements lock (asks PyPI)
	@scripts/controller.sh requirements.txt requirements-dev.txt
	@.venv/bin/python scripts/audit.py

unit: ## unit tests alone
	@scripts/controller.sh requirements.txt requirements-dev.txt webhook/requirements.txt
	@.venv/bin/python -m pytest tests/unit $(ARGS)

lock: ## pin the requirements again, with hashes
	@scripts/lock.sh

clean: ## remove .venv and caches; the stack stays
	rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache .ansible
