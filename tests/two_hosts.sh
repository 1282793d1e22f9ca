#!/usr/bin/env bash
# Two hosts on one machine: network namespaces connected by a veth cable, two ranks on each, with real TCP between them.
# The result must be bit-equal to that of four ranks on one host. Needs root, iproute2 and a build with --features mpi.
#   tests/two_hosts.sh PATH_TO_VILG FOLDER    # FOLDER contains tiny.toml, as made by tests/it/ranks.rs
set -euo pipefail
vilg=$(realpath "$1")
cd "$2"

skip() { echo "skipped: $*"; exit 0; }
[ "$(id -u)" = 0 ] || skip "network namespaces need root"
command -v ip >/dev/null || skip "iproute2 is not installed"
id=vilg$$
a=${id}a b=${id}b
work=$(mktemp -d)
cleanup() {
    for host in "$a" "$b"; do ip netns del "$host" 2>/dev/null || true; done
    rm -rf "$work"
}
trap cleanup EXIT
ip netns add "$a" 2>/dev/null || skip "network namespaces are not allowed here"
ip netns add "$b"
# At most 15 characters a name.
ip link add "v$$a" netns "$a" type veth peer name "v$$b" netns "$b" 2>/dev/null || skip "veth pairs are not allowed here"
address=1
for host in "$a" "$b"; do
    ip -n "$host" addr add "10.77.0.$address/24" dev "v$$${host: -1}"
    ip -n "$host" link set "v$$${host: -1}" up
    ip -n "$host" link set lo up
    address=2
done

# Replaces ssh for mpirun: enters the host's network namespace with its own host name. mpirun itself runs on the first host.
cat >"$work/rsh" <<RSH
#!/usr/bin/env bash
host=\$1
shift
case \$host in 10.77.0.1) space=$a name=host-a ;; *) space=$b name=host-b ;; esac
exec ip netns exec \$space unshare --uts bash -c "hostname \$name && cd '$PWD' && \$*"
RSH
chmod +x "$work/rsh"

export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
common=(--bind-to none --oversubscribe --mca mpi_yield_when_idle 1 --mca btl_vader_single_copy_mechanism none)
wires=(--mca btl_tcp_if_include 10.77.0.0/24 --mca oob_tcp_if_include 10.77.0.0/24 --mca plm_rsh_agent "$work/rsh")
settings=(--threads 2 train --config tiny.toml --set train.zero_stage=3)
ip netns exec "$a" unshare --uts bash -c 'hostname host-a && exec "$@"' _ \
    mpirun "${common[@]}" "${wires[@]}" --host 10.77.0.1:2,10.77.0.2:2 -n 4 "$vilg" "${settings[@]}" --set name=two-hosts
sent=$(ip netns exec "$a" cat "/sys/class/net/v$$a/statistics/tx_bytes")
mpirun "${common[@]}" -n 4 "$vilg" "${settings[@]}" --set name=one-host
cmp runs/two-hosts/model/model.safetensors runs/one-host/model/model.safetensors

# The same without MPI: each rank finds the host of rank 0 by torchrun's variables.
export MASTER_ADDR=10.77.0.1 MASTER_PORT=29577 WORLD_SIZE=4
pids=()
for rank in 0 1 2 3; do
    host=$a name=host-a
    [ $rank -lt 2 ] || host=$b name=host-b
    RANK=$rank LOCAL_RANK=$((rank % 2)) ip netns exec "$host" unshare --uts bash -c 'hostname $0 && exec "$@"' $name \
        "$vilg" "${settings[@]}" --set name=two-hosts-tcp &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
cmp runs/two-hosts-tcp/model/model.safetensors runs/one-host/model/model.safetensors
[ "$sent" -gt 100000 ] || { echo "only $sent bytes went over the cable"; exit 1; }
echo "two hosts gave the bits of one; $sent bytes went over the cable from one to the other"
