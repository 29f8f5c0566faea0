#!/usr/bin/env bash
# Installs what tests/system needs from Debian's packages: ssh server, pdsh, OpenMPI, Slurm, Grid Engine, iproute2.
#
# No daemon is started, and none is left running. Quick when everything is there. Meant for a test machine or a
# container: it wants root, and on a machine that boots with systemd the services are enabled for the next boot.
set -euo pipefail

readonly PACKAGES=(openssh-server openssh-client pdsh openmpi-bin slurmctld slurmd slurm-client munge
    gridengine-master gridengine-exec gridengine-client iproute2 procps)
readonly POLICY=/usr/sbin/policy-rc.d # what Debian's maintainer scripts ask before they start a service
readonly LOCK=/run/lock/train-system-packages

stop() {
    echo "install_packages.sh: $1" >&2
    exit 1
}

missing=()
for package in "${PACKAGES[@]}"; do
    [[ "$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>&1)" == installed ]] || missing+=("$package")
done
[[ ${#missing[@]} -gt 0 ]] || exit 0

command -v apt-get >/dev/null || stop "apt-get was not found: Debian 12 or an Ubuntu of its age is expected"
[[ "$(id -u)" == 0 ]] || stop "packages are missing (${missing[*]}) and only root can install them"
exec 9>"$LOCK"
flock 9 # two test sessions at once: the second finds everything installed

if [[ ! -e "$POLICY" ]]; then
    trap 'rm -f "$POLICY"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$POLICY"
    chmod 755 "$POLICY"
fi
log="$(mktemp)"
export DEBIAN_FRONTEND=noninteractive
# msmtp-mta: Grid Engine's mail command wants a mail server, and the default one is a daemon.
if ! { apt-get update && apt-get install --yes --no-install-recommends -o DPkg::Lock::Timeout=300 \
    msmtp-mta "${missing[@]}"; } </dev/null >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    stop "apt-get could not install ${missing[*]}; its whole output is in $log"
fi
rm "$log"
