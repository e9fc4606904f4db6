#!/usr/bin/env bash
# What all tests share: an engine, a base image, and the tools that make them. As `site.yml` makes them, under a name of the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
inventory=$(mktemp -d)
trap 'rm -rf "$inventory"' EXIT
python - "$inventory" <<'PYTHON'
import sys
from pathlib import Path

sys.path.insert(0, ".")
from tests.support.sites import Site

Site("wht-prepare", Path(sys.argv[1]), 8)
PYTHON
ansible-playbook -i "$inventory" site.yml --tags engine,base_image
# The lock of that run stood there.
ansible -i "$inventory" localhost --become -m ansible.builtin.file -a "path=/opt/wht-prepare state=absent" >/dev/null
# Bare test hosts are made with it even where the base image was pulled.
command -v mmdebstrap >/dev/null || ansible -i "$inventory" localhost --become -m ansible.builtin.apt -a "name=mmdebstrap update_cache=true install_recommends=false"
