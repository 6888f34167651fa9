#!/usr/bin/env bash
# Starts a program as several ranks on this machine, as torchrun does on many: launch.sh NPROC PROGRAM ARGUMENTS...
# Ends with status 0 when all have. When one fails it says which, gives the others ten seconds to end, and then stops them.
set -u

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "launch.sh NPROC PROGRAM ARGUMENTS..." >&2
  exit 2
fi
export WORLD_SIZE=$1 MASTER_ADDR=127.0.0.1
shift

# Below the ports that the system gives to outgoing connections.
if [[ -z ${MASTER_PORT:-} ]]; then
  while MASTER_PORT=$((20000 + RANDOM % 12000)) && (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do :; done
  export MASTER_PORT
fi

declare -A rank_of
stop() { kill "-$1" "${!rank_of[@]}" 2>/dev/null; }
trap 'stop TERM; exit 143' TERM
trap 'stop INT; exit 130' INT

for ((rank = 0; rank < WORLD_SIZE; rank++)); do
  RANK=$rank "$@" &
  rank_of[$!]=$rank
done

# Those that wait for a lost rank say so and end; one that is busy, or that waits for something else, does not.
stop_after_ten_seconds() {
  for ((tenth = 0; tenth < 100; tenth++)); do
    [[ -n $(jobs -rp) ]] || return
    sleep 0.1
  done
  stop KILL
}

result=0
while ((${#rank_of[@]} > 0)); do
  wait -n -p ended "${!rank_of[@]}"
  status=$?
  rank=${rank_of[$ended]}
  unset "rank_of[$ended]"
  ((status == 0)) && continue
  echo "launch.sh: rank $rank ended with status $status" >&2
  if ((result == 0)); then
    result=$status
    stop_after_ten_seconds
  fi
done
exit "$result"
