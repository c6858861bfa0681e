#!/bin/bash
# Checks and trains on one host, again while the exit code is 42 or 127-255:
#     rerun.sh RESTARTS EXPERIMENT [--run-dir DIR] [--FIELD VALUE ...]
# RESTARTS times at most without a checkpoint further than all before in the run directory, if that is
# named. SIGTERM is passed on and ends it: the run saves, and is not started again.
set -u
# A process that is lost has been noticed by then (processes.heartbeat_timeout is 100 seconds), so
# none of the others is still in the run that this one left.
PAUSE=${PAUSE:-120}
if [ $# -lt 2 ] || ! [[ $1 =~ ^[0-9]+$ ]]; then
    echo "error: give RESTARTS EXPERIMENT [OPTIONS]" >&2
    exit 2
fi
restarts=$1
shift

child=
stopping=
heard=
stop() {
    stopping=1
    heard=1
    [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
trap stop TERM INT

run_dir=
for ((i = 1; i <= $#; i++)); do
    next=$((i + 1))
    case ${!i} in
    --run-dir) run_dir=${!next-} ;;
    --run-dir=*) run_dir=${!i#--run-dir=} ;;
    esac
done

# Looks for the newest checkpoint; only what is written whole has a step for a name.
furthest=0
moved_on() {
    local before=$furthest place step
    [ -n "$run_dir" ] || return 1
    for place in "$run_dir"/checkpoints/*; do
        step=${place##*/}
        [[ $step =~ ^[0-9]+$ ]] && ((10#$step > furthest)) && furthest=$((10#$step))
    done
    ((furthest > before))
}

# Runs a command to its end. A signal that is passed on interrupts `wait`, not the command: asked
# once more, `wait` gives the command's own code, even if that has ended meanwhile.
code=0
run() {
    transfusion-jax "$@" &
    child=$!
    [ -z "$stopping" ] || kill -TERM "$child" 2>/dev/null
    while
        heard=
        wait "$child"
        code=$?
        [ -n "$heard" ]
    do :; done
    child=
}

moved_on
for ((left = restarts; ; left--)); do
    run check "$@"
    if [ "$code" -eq 0 ]; then
        if [ -n "$stopping" ]; then
            code=42
        else
            run train "$@"
        fi
    fi
    echo "exit code $code"
    ! moved_on || left=$restarts
    if [ -n "$stopping" ] || ((left == 0)) || ((code != 42 && code < 127)); then
        exit "$code"
    fi
    echo "starting again, $((left - 1)) restarts left"
    sleep "$PAUSE" &
    wait $!
    [ -z "$stopping" ] || exit 42
done
