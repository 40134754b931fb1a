"""The files of a Slurm cluster for tests (``slurm_cluster``): slurm.conf and what belongs to it."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

CPUS = 16  # that a node claims
MEGABYTES = 64000

# Nothing in the database must outlive the tests, so nothing waits for the disk.
DATABASE = (
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-flush-method=nosync",
    "--innodb-doublewrite=0",
    "--innodb-log-file-size=4M",
    "--innodb-buffer-pool-size=16M",
)


@dataclass
class Settings:
    """What the files depend on."""

    folder: Path
    host: str  # this machine's name
    head: str  # its address
    addresses: dict[str, str]  # of the nodes
    ports: list[int]  # controller, database, then the nodes in order
    gpus: int  # a node
    accounting: bool
    user_signal: bool
    grace: int  # seconds


def write(settings: Settings) -> None:
    """Writes all files and makes the folders and device files they name."""
    folder = settings.folder
    for name in ("log", "run", "state", "dev", *(f"spool/{node}" for node in settings.addresses)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(settings.gpus):
        device = folder / "dev" / f"gpu{index}"
        if not device.exists():
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null
    (folder / "slurm.conf").write_text(slurm_conf(settings))
    (folder / "gres.conf").write_text(gres_conf(settings))
    (folder / "hosts").write_text(hosts(settings))
    if settings.accounting:
        database = folder / "slurmdbd.conf"
        database.touch(mode=0o600)  # slurmdbd refuses one that others may read
        database.write_text(slurmdbd_conf(settings))


def slurm_conf(settings: Settings) -> str:
    """The controller's, the nodes' and the clients' file.

    Requeueing, preemption and node loss are Slurm's defaults, but quicker.
    """
    folder, ports = settings.folder, settings.ports
    gpus = f" Gres=gpu:h200:{settings.gpus}" if settings.gpus else ""
    nodes = [
        f"NodeName={name} NodeHostname={name} NodeAddr={address} Port={port} CPUs={CPUS} RealMemory={MEGABYTES}{gpus}"
        for (name, address), port in zip(settings.addresses.items(), ports[2:], strict=True)
    ]
    accounting = [
        "AccountingStorageType=accounting_storage/slurmdbd",
        f"AccountingStorageHost={settings.head}",
        f"AccountingStoragePort={ports[1]}",
        f"AccountingStoragePass={folder}/munge.sock",
    ]
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={settings.host}({settings.head})",
        f"SlurmctldPort={ports[0]}",
        "SlurmUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge.sock",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool/%n",
        f"SlurmctldPidFile={folder}/run/slurmctld.pid",
        f"SlurmdPidFile={folder}/run/slurmd.%n.pid",
        f"SlurmctldLogFile={folder}/log/slurmctld.log",
        f"SlurmdLogFile={folder}/log/slurmd.%n.log",
        "MailProg=/bin/true",
        # No cgroups, which a container may not have.
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "MpiDefault=none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SlurmdParameters=config_overrides",  # a node may claim more CPUs than the machine has
        "SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        *(["SlurmctldParameters=preempt_send_user_signal"] if settings.user_signal else []),
        "ReturnToService=1",
        # A dead node is found after 11 s, one that is cut off after 17 s (one run each). With the usual MessageTimeout
        # of 10 s both take 30 s; with a shorter SlurmdTimeout a machine that is busy with tests loses nodes.
        "SlurmdTimeout=10",
        "MessageTimeout=5",
        "KillWait=5",
        "MinJobAge=3600",  # scontrol knows ended jobs so long
        *(accounting if settings.accounting else []),
        *(["GresTypes=gpu"] if settings.gpus else []),
        *nodes,
        f"PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime={settings.grace}",
        "PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF",
        "PartitionName=small Nodes=n1 MaxTime=10 MaxNodes=1 PriorityTier=1",
    ]
    return "\n".join(lines) + "\n"


def gres_conf(settings: Settings) -> str:
    """The nodes' GPUs. Slurm refuses a count without files."""
    if not settings.gpus:
        return ""
    files = f"{settings.folder}/dev/gpu[0-{settings.gpus - 1}]"
    return "".join(f"NodeName={name} Name=gpu Type=h200 File={files}\n" for name in settings.addresses)


def hosts(settings: Settings) -> str:
    """The nodes' /etc/hosts."""
    lines = ["127.0.0.1 localhost", f"{settings.head} {settings.host}"]
    lines += [f"{address} {name}" for name, address in settings.addresses.items()]
    return "\n".join(lines) + "\n"


def slurmdbd_conf(settings: Settings) -> str:
    """The accounting daemon's file. It finds the database's socket by MYSQL_UNIX_PORT."""
    folder = settings.folder
    lines = [
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge.sock",
        f"DbdHost={settings.host}",
        f"DbdAddr={settings.head}",
        f"DbdPort={settings.ports[1]}",
        "SlurmUser=root",
        f"PidFile={folder}/run/slurmdbd.pid",
        f"LogFile={folder}/log/slurmdbd.log",
        "StorageType=accounting_storage/mysql",
        "StorageHost=localhost",
        "StorageUser=root",
        "StorageLoc=slurm",
    ]
    return "\n".join(lines) + "\n"
