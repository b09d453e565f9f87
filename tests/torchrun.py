"""torchrun, but that its workers are forks of this process, which has imported torch already: a new
one takes five seconds. Its command line, its agent and the environment of its workers are torch's.

    tests/torchrun.py --nproc_per_node=2 SCRIPT [arguments]
"""

import multiprocessing
import runpy
import sys

from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args


def work(script, *arguments):
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    multiprocessing.current_process().daemon = False    # as scripts.py starts it: no children then
    _arguments = parse_args(sys.argv[1:])
    _config, _, _ = config_from_args(_arguments)
    _config.start_method = "fork"
    elastic_launch(_config, work)(_arguments.training_script, *_arguments.training_script_args)
