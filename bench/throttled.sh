#!/bin/bash
# Two MPI ranks in network namespaces of their own, joined by a link of a given rate: bench/throttled.sh 1gbit
# Needs root, iproute2 and Open MPI. PYTHON is the interpreter, whose mpirun is beside it or in PATH.
set -euo pipefail
rate=${1:?a rate, such as 1gbit}
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")" && pwd)
PATH=$(dirname "$(command -v "$python")"):$PATH
work=$(mktemp -d)
cleanup() {
    for side in a b; do ip netns del "fastattn-$side" 2> /dev/null || true; done
    rm -rf "$work"
}
trap cleanup EXIT

number=1
printf '127.0.0.1 localhost\n' > "$work/hosts"
for side in a b; do
    ip netns add "fastattn-$side"
    printf '10.222.0.%d %s\n' "$number" "$side" >> "$work/hosts"
    number=$((number + 1))
done
ip link add fastattn-va type veth peer name fastattn-vb
number=1
for side in a b; do
    ip link set "fastattn-v$side" netns "fastattn-$side"
    ip -n "fastattn-$side" addr add "10.222.0.$number/24" dev "fastattn-v$side"
    ip -n "fastattn-$side" link set "fastattn-v$side" up
    ip -n "fastattn-$side" link set lo up
    tc -n "fastattn-$side" qdisc add dev "fastattn-v$side" root tbf rate "$rate" burst 512kb latency 20ms
    number=$((number + 1))
done

# In ssh's place: a command goes into the namespace that is called as the host.
cat > "$work/agent" << 'AGENT'
#!/bin/bash
while [[ $1 == -* ]]; do shift; done
host=$1
shift
exec nsenter --net="/run/netns/fastattn-$host" unshare --uts bash -c "hostname $host; $*"
AGENT
chmod +x "$work/agent"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
nsenter --net=/run/netns/fastattn-a unshare --uts --mount bash -c "
    hostname a
    mount --bind '$work/hosts' /etc/hosts
    mpirun --host a:1,b:1 -n 2 --mca plm_ssh_agent '$work/agent' --mca pml ob1 --mca btl self,tcp \
        ${PYTHONPATH:+-x PYTHONPATH} '$python' '$here/measure_scale.py' messages ${*:2}"
