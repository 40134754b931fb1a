"""``launch slurm``: trains as a Slurm job, through submitit.

``options`` reads the words, ``profile`` what is always the same on a cluster, ``check`` looks at what can be wrong,
``submit`` hands the job to Slurm, ``task`` is what each of its tasks runs, ``job.sh`` decides at its end.
"""

from launch.slurm.command import main as main
