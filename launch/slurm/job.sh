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

STOPS=20  # requested stops before a first new step: a job whose time ends within its start would go on for ever

job=$SLURM_JOB_ID
# An array's last element has the array's own number: by that all elements would be queued again.
[ -n "${SLURM_ARRAY_JOB_ID:-}" ] && job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
restart=${SLURM_RESTART_COUNT:-0}
run=$(sed -n "$((${SLURM_ARRAY_TASK_ID:-0} + 1))p" "$DISTRIB_SUBMISSION/runs")
own=$run/launch

begin() {
    export DISTRIB_REPORTS=$own/reports/$job.$restart DISTRIB_RANK_LOGS=$own/logs DISTRIB_BAD_HOSTS_FILE=$own/bad_hosts
    mkdir -p "$DISTRIB_REPORTS" "$DISTRIB_RANK_LOGS" || exit 1
    event began "\"nodes\": $(quoted "$SLURM_JOB_NODELIST")"
    if [ -e "$own/stop" ]; then  # it came between two starts
        event ended "\"code\": 75, \"step\": $(newest_step), \"reason\": \"launch stop\", \"then\": \"over\""
        exit 75
    fi
    # When the time is up Slurm asks this shell to end too. It ends with srun, and then still has to queue the job.
    trap : TERM
}

# finish CODE: says how the run ended, and has the job queued again where that makes sense. Does not return.
finish() {
    code=$(verdict "$1")
    reason=$(reason "$code")
    step=$(newest_step)
    then=over
    case $code in
    0 | 2) ;;
    *)
        if [ -e "$own/stop" ]; then
            reason="launch stop"
        elif [ "$(state)" = CANCELLED ]; then
            reason="cancelled"
        elif worth_another; then
            then=requeued
        fi
        ;;
    esac
    if [ $then = requeued ]; then
        event ended "\"code\": $code, \"step\": $step, \"reason\": $(quoted "$reason"), \"then\": \"requeued\""
        exclude_bad_hosts
        scontrol requeue "$job" && exit "$code"  # Slurm ends this script about now
        reason="$reason; scontrol could not queue the job again"
    fi
    event ended "\"code\": $code, \"step\": $step, \"reason\": $(quoted "$reason"), \"then\": \"over\""
    echo "$reason"
    exit "$code"
}

# All ranks must have said 75 for a stop: one that failed did not save. Who has the user's mistake to tell says 2.
verdict() {
    cat "$DISTRIB_REPORTS"/* 2>/dev/null | awk -v code="$1" -v world="$DISTRIB_WORLD" '
        NF >= 2 && $1 ~ /^[0-9]+$/ && $2 ~ /^[0-9]+$/ { last[$1] = $2 }
        END {
            for (rank in last) { n++; if (last[rank] == 75) stopped++; else if (last[rank] == 0) done++;
                                 else if (last[rank] == 2) mistake++ }
            if (mistake) print 2
            else if (n == world && stopped && stopped + done == n) print 75
            else if (code == 0) print 0
            else print 1
        }'
}

reason() {
    case $1 in
    0) echo "finished" ;;
    75) echo "asked to stop: preempted, or the time was up" ;;
    *)
        said=$(cat "$DISTRIB_REPORTS"/* 2>/dev/null | awk -v code="$1" '$1 ~ /^[0-9]+$/ && $2 == code { rank = $1; $1 = $2 = ""
            sub(/^ +/, ""); print "rank " rank ": " ($0 == "" ? "exit code " code : $0); exit }')
        bad=$(sed -n 1p "$DISTRIB_BAD_HOSTS_FILE" 2>/dev/null)
        echo "${said:-${bad:-a rank was killed, or its node was lost}}"
        ;;
    esac
}

# Whether the next start may get further than this one. Counts the starts that ended at one step.
worth_another() {
    what=failed most=$DISTRIB_FAILURES
    [ "$code" = 75 ] && what=stopped most=$STOPS
    seen_step=$(sed -n "s/^$what \([0-9]*\) .*/\1/p" "$own/attempts" 2>/dev/null)
    count=$(sed -n "s/^$what [0-9]* //p" "$own/attempts" 2>/dev/null)
    [ "$seen_step" = "$step" ] || count=0
    count=$((${count:-0} + 1))
    { grep -v "^$what " "$own/attempts" 2>/dev/null; echo "$what $step $count"; } >"$own/attempts.new"
    mv "$own/attempts.new" "$own/attempts"
    [ "$count" -lt "$most" ] && return 0
    reason="$what $count times at step $step without a newer checkpoint: $reason"
    return 1
}

newest_step() {
    ls "$run/checkpoints" 2>/dev/null | sed -n 's/^step_0*\([0-9][0-9]*\)\.pt$/\1/p' | sort -n | tail -n 1 | grep . || echo 0
}

state() {
    scontrol show job -o "$job" 2>/dev/null | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p'
}

exclude_bad_hosts() {
    [ "$DISTRIB_EXCLUDE" = true ] || return 0
    hosts=$({ awk 'NF { print $1 }' "$DISTRIB_BAD_HOSTS_FILE"; echo "${SLURM_JOB_EXCLUDED:-}"; } 2>/dev/null |
        sort -u | grep . | paste -sd, -)
    [ -n "$hosts" ] && scontrol update JobId="$job" ExcNodeList="$hosts"
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
