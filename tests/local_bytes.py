"""Runs a trainer and prints [bytes of parameters and Adam's moments that this rank holds, bytes of the whole]."""
import importlib
import json

from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook


def main(argv):
    optimizers = set()
    register_optimizer_step_post_hook(lambda optimizer, args, kwargs: optimizers.add(optimizer))
    importlib.import_module(argv[0]).main(argv[1:])
    optimizer, = optimizers
    local, whole = 0, 0
    for parameter, state in optimizer.state.items():
        for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"]):
            whole += tensor.nbytes
            local += tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes
    print(json.dumps([local, whole]))
