"""Runs a training script up to its optimiser's first step, and ends there: python experiments/speed/first_step.py
SCRIPT [its arguments]
"""

import os
import runpy
import sys


def stop(*_: object) -> None:
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(stop)
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit("no optimiser made a step")
