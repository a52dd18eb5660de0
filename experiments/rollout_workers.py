"""The processes in which moto.py plays the episodes of an evaluation and makes demonstrations.
moto.py imports it on demand.
"""
import atexit, copy, functools, multiprocessing, os, pickle, signal, threading
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor

import torch

import moto

worker = {}                 # in a rollout worker's process: its cfg and env


def init_worker(cfg):
    """The start of a rollout worker's process. It ends with its parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)          # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(1)
    worker["cfg"] = cfg
    worker["env"] = moto.make_env(cfg)
    atexit.register(worker["env"].close)                  # SHARP: EGL complains of an open renderer


def call_in_worker(function, item):
    return function(worker["cfg"], worker["env"], item)


def ready(cfg, env, item):
    """Called once by each rollout worker: fails if it cannot start."""


def play_episode(cfg, env, item):
    policy, seed = item
    policy = pickle.loads(policy) if isinstance(policy, bytes) else policy
    return moto.rollout(cfg, env, policy, seed, sample=False)


class RolloutWorkers:
    """Processes that play episodes, each with a simulator of its own, on one core. With one worker
    all is played here, in this process. Raises moto.EpisodeError where one does not start or has
    died."""

    def __init__(self, cfg, env):
        self.cfg, self.env, self.pool = cfg, env, None
        if cfg.workers > 1:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(cfg.workers, context, init_worker, (cfg,))
            list(self.each(ready, range(cfg.workers)))

    def each(self, function, items):
        """function(cfg, env, item) for each item, in order, as a generator."""
        here = functools.partial(function, self.cfg, self.env)
        there = functools.partial(call_in_worker, function)
        try:
            yield from self.pool.map(there, items) if self.pool else map(here, items)
        except BrokenExecutor:
            self.close()                                  # its thread must end before Python does
            moto.exit_if_asked()                          # the signal went to all of them
            raise moto.EpisodeError(
                "a rollout worker has died (out of memory? it may have said why): use --workers 1. "
                "A script must call moto.main under `if __name__ == \"__main__\":`, and register "
                "environments above it") from None

    def play(self, policy, seeds):
        """A `rollout` per seed by the policy as it is now, on the CPU, as a generator. With several
        workers its classes must be importable there."""
        policy = copy.deepcopy(policy).cpu()
        policy = pickle.dumps(policy) if self.pool else policy
        return self.each(play_episode, [(policy, seed) for seed in seeds])

    def close(self):
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
