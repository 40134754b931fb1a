# What a job of `launch slurm` does around its one srun: sourced by the batch script, which calls begin and finish.
# Shell, sed and awk only: the host of a container may have nothing else. scontrol is there, outside any container.
#
# In:  DISTRIB_SUBMISSION    folder of the submission; its file "runs" has one run folder a line, one for each element
#      DISTRIB_WORLD         ranks of the run
#      DISTRIB_FAILURES      starts that may fail at one step, before the run is given up
#      DISTRIB_EXCLUDE       "true": a node on which a rank failed is left out when the job is queued again
# Out: DISTRIB_REPORTS       folder in which each node's ranks say how they ended in this start
#      DISTRIB_RANK_LOGS     folder of the ranks' logs
#      DISTRIB_BAD_HOSTS_FILE    where a rank names a node that is not fit: "HOST REASON"
#
# What Slurm 22.05 does to this script: at the time limit, `scontrol requeue` and scancel it and all ranks get SIGTERM,
# and after KillWait SIGKILL. While it waits the job's state reads COMPLETING. It may queue the job again then, too.

STOPS=20  # requested stops before a first new step: a job whose time ends within its start would go on for ever

host_path=$PATH  # the ranks' PATH, which comes later, may lack Slurm's commands
job=$SLURM_JOB_ID
# An array's last element has the array's own number: by that all elements would be queued again.
[ -n "${SLURM_ARRAY_JOB_ID:-}" ] && job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
restart=${SLURM_RESTART_COUNT:-0}
run=$(sed -n "$((${SLURM_ARRAY_TASK_ID:-0} + 1))p" "$DISTRIB_SUBMISSION/runs")
own=$run/launch

begin() {
    ranks_path=$PATH
    host_path=$host_path:$PATH  # a module may have brought Slurm's commands
    PATH=$host_path
    host_srun=$(unset -f srun && command -v srun)
    export DISTRIB_REPORTS="$own/reports/$job.$restart" DISTRIB_RANK_LOGS="$own/logs"
    export DISTRIB_BAD_HOSTS_FILE="$DISTRIB_REPORTS.bad_hosts"
    mkdir -p "$DISTRIB_REPORTS" "$DISTRIB_RANK_LOGS" || exit 1
    before=$(grep -F "\"job\": \"$job\"" "$own/events.jsonl" 2>/dev/null | tail -n 1)
    event began "\"nodes\": $(quoted "$SLURM_JOB_NODELIST"), \"step\": $(newest_step)"
    if [ -e "$own/stop" ]; then  # it came between two starts
        ended 75 "launch stop" over
    fi
    case $before in
    '{"event": "began"'*)
        worth_another lost "the start before had no time to say how it ended: a node was lost, perhaps" ||
            ended 1 "$reason" over
        ;;
    esac
    trap : USR1 USR2  # the ranks' signals, which scancel --full sends here too: the shell would die of them
    trap overrun TERM
    PATH=$ranks_path
}

# submitit's line calls this in srun's stead. A shell that waits for a process in the background hears signals at once.
srun() {
    "$host_srun" "$@" &
    child=$!
    while :; do
        wait $child
        srun_code=$?
        [ "$srun_code" -gt 128 ] && kill -0 $child 2>/dev/null || return $srun_code
    done
}

# At the time limit the ranks have not heeded the signal that came before: they hang, or they still save. Slurm may kill
# this script together with them, so the job is queued again before it is known how they end.
overrun() {
    PATH=$host_path
    [ "$(fate)" = overrun ] || return 0
    worth_another failed "the time limit was reached before all ranks had saved" && requeue
}

# finish CODE: says how the run ended, and has the job queued again where that makes sense. Does not return.
finish() {
    PATH=$host_path
    trap '' TERM USR1 USR2  # ignored here is ignored by scontrol too, which has Slurm end this script
    code=$(verdict "$1")
    reason=$(reason "$code")
    then=over
    case $code in
    0 | 2) ended "$code" "$reason" over ;;
    3) ended 1 "diverged, and another start would again: $reason" over ;;
    esac
    case $(fate) in
    requeued) then=requeued ;;
    cancelled) reason=cancelled ;;
    *)
        what=failed
        [ "$code" = 75 ] && what=stopped
        if [ -e "$own/stop" ]; then
            reason="launch stop"
        elif worth_another $what "$reason"; then
            requeue && then=requeued
        fi
        ;;
    esac
    [ $then = requeued ] && exclude_bad_hosts
    ended "$code" "$reason" $then
}

# What becomes of the job, as Slurm sees it: "open": it runs until this script ends; "overrun": so it does, and its time
# is up; "requeued": it is queued again already; "cancelled".
fate() {
    scontrol show job -o "$job" 2>/dev/null | tr ' ' '\n' | awk -F= -v restart="$restart" '
        $1 == "JobState" { state = $2 } $1 == "Reason" { reason = $2 } $1 == "Restarts" { restarts = $2 }
        END {
            if (restarts + 0 > restart + 0) print "requeued"
            else if (state ~ /^TIMEOUT/ || (state ~ /^COMPLETING/ && reason == "TimeLimit")) print "overrun"
            else if (state ~ /^(CANCELLED|COMPLETING)/) print "cancelled"
            else print "open"
        }'
}

requeue() {
    scontrol requeue "$job" && return 0
    reason="$reason; scontrol could not queue the job again"
    return 1
}

# ended CODE REASON THEN: says so in the record and ends this script.
ended() {
    event ended "\"code\": $1, \"step\": $(newest_step), \"reason\": $(quoted "$2"), \"then\": \"$3\""
    [ "$3" = requeued ] || printf '%s\n' "$2"
    exit "$1"
}

# verdict CODE: the run's code, from srun's and what the ranks said. All must have said 75 for a stop: one that failed did
# not save. Who has the user's mistake to tell says 2; 3: the loss is no number (diverged); 4: a bad machine, which is a
# failure like others here. A task that was stopped before it had ranks says "none 75": without it no rank has begun.
verdict() {
    cat "$DISTRIB_REPORTS"/* 2>/dev/null | awk -v code="$1" -v world="$DISTRIB_WORLD" '
        $1 == "none" && $2 == 75 { early = 1 }
        NF >= 2 && $1 ~ /^[0-9]+$/ && $2 ~ /^[0-9]+$/ { last[$1] = $2 }
        END {
            for (rank in last) {
                if (last[rank] == 0) done++
                else if (last[rank] == 75) stopped++
                else if (last[rank] == 2) mistake++
                else if (last[rank] == 3) diverged++
                else failed++
            }
            if (done == world) print 0
            else if (mistake) print 2
            else if (diverged) print 3
            else if (!failed && (code == 0 || early || done + stopped == world)) print 75
            else print 1
        }'
}

reason() {
    case $1 in
    0) echo "finished" ;;
    75) echo "asked to stop: preempted, or the time was up" ;;
    *)
        said=$(cat "$DISTRIB_REPORTS"/* 2>/dev/null | awk -v code="$1" '
            $1 ~ /^[0-9]+$/ && ($2 == code || (code == 1 && $2 == 4)) { rank = $1; $1 = $2 = ""
            sub(/^ +/, ""); if ($0 !~ /^rank /) $0 = "rank " rank ": " ($0 == "" ? "exit code " code : $0)
            if (first == "" || (/was killed/ && first !~ /was killed/)) first = $0 }  # the others fail because of it
            END { if (first != "") print first }')
        bad=$(sed -n 1p "$DISTRIB_BAD_HOSTS_FILE" 2>/dev/null)
        printf '%s\n' "${bad:-${said:-a rank was killed, or its node was lost}}"
        ;;
    esac
}

# worth_another failed|stopped|lost REASON: whether the next start may get further. Counts this job's starts that ended
# so at one step; where they are too many, `reason` says so.
worth_another() {
    most=$STOPS
    [ "$1" = failed ] && most=$DISTRIB_FAILURES
    step=$(newest_step)
    file=$own/reports/$job.attempts
    count=$(sed -n "s/^$1 $step //p" "$file" 2>/dev/null)
    count=$((${count:-0} + 1))
    {
        grep -v "^$1 " "$file" 2>/dev/null
        echo "$1 $step $count"
    } >"$file.new"
    mv "$file.new" "$file"
    [ "$count" -lt "$most" ] && return 0
    reason="$1 $count times at step $step without a newer checkpoint: $2"
    return 1
}

newest_step() {
    for file in "$run/checkpoints"/step_*.pt; do :; done  # the last: their numbers are equally long
    printf '%s\n' "$file" | sed -n 's/.*step_0*\([0-9][0-9]*\)\.pt$/\1/p' | grep . || echo 0
}

# Slurm lets this be changed while a job waits, not while it runs: so once it is queued again.
exclude_bad_hosts() {
    [ "$DISTRIB_EXCLUDE" = true ] || return 0
    bad=$(awk 'NF { print $1 }' "$DISTRIB_BAD_HOSTS_FILE" 2>/dev/null | sort -u | paste -sd, -)
    [ -n "$bad" ] || return 0
    before=$(scontrol show job -o "$job" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p' | grep -v null)
    scontrol update JobId="$job" ExcNodeList="$before${before:+,}$bad"
}

# event NAME FIELDS: one line in the run's record, with what each of them has.
event() {
    printf '{"event": "%s", "time": "%s", "job": "%s", "restart": %s, %s}\n' \
        "$1" "$(date +%Y-%m-%dT%H:%M:%S%z)" "$job" "$restart" "$2" >>"$own/events.jsonl"
}

# A JSON string of one line.
quoted() {
    printf '"%s"' "$(printf %s "$1" | tr '\t\r\n' '   ' | tr -d '\000-\037' | sed 's/\\/\\\\/g; s/"/\\"/g')"
}
