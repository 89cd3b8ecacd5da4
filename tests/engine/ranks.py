"""Runs of train.py as `torchrun` would start them, in processes forked from one that has imported everything.

python ranks.py JOBS, a JSON list of [number of processes, overrides]. Digits are split so that two processes get unlike shares of the test
samples, 182 and 181. Ends at the first job that fails, with its status.
"""

import json
import os
import socket
import sys

import torch
import torch.distributed.fsdp

import tasks.engine.run  # noqa: F401
import train
from data.digits import DigitsData


def job(processes: int, overrides: list[str]) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(processes):
        child = os.fork()
        if not child:
            if processes > 1:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "GROUP_RANK": 0}
                os.environ |= {k: str(v) for k, v in place.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
                os.environ |= {"LOCAL_WORLD_SIZE": str(processes)}
            sys.argv = ["train.py", *overrides]
            status = 70
            try:
                status = train.entry()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    torch.set_num_threads(1)
    DigitsData.split_sizes = lambda self, count: (count - 543, 180)
    sys.exit(next((status for number in json.loads(sys.argv[1]) if (status := job(*number))), 0))
