"""Where the time of an update goes, against what the machine can do.

    python experiments/bench.py                            # the preset of this machine: minutes
    python experiments/bench.py --preset debug --device cpu --json

Every flag of moto.py's Config works here. Prints a table, or with --json a JSON object. The
figures at the top level are those of the form of the update that is fastest once it runs, named
in `form`.

Axes and letters as in moto.py.
"""
import argparse
import contextlib
import dataclasses
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import moto


def medians(calls, repeat, device):
    """Time each of a dict of calls `repeat` times, taking turns, so that a busy moment of the
    machine hits all of them alike -> dict of the median seconds."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    timings = {name: [] for name in calls}
    for _ in range(repeat):
        for name, call in calls.items():
            wait()
            started = time.perf_counter()
            call()
            wait()
            timings[name].append(time.perf_counter() - started)
    return {name: float(np.median(values)) for name, values in timings.items()}


def flops(call):
    """Floating-point operations of one call, by torch's own counter: products and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def measured_peak(cfg):
    """Floating-point operations per second of this machine in cfg's number format: the best of
    some matrix products, each the median of many."""
    kind = torch.bfloat16 if cfg.precision == "bfloat16" else torch.float32
    sizes = (2048, 4096, 8192) if cfg.device.startswith("cuda") else (512, 1024, 2048)
    squares = {n: torch.randn(n, n, device=cfg.device).to(kind) for n in sizes}
    calls = {n: (lambda m: lambda: m @ m)(m) for n, m in squares.items()}
    medians(calls, 3, cfg.device)
    return max(2 * n ** 3 / seconds for n, seconds in medians(calls, 15, cfg.device).items())


def machine(device):
    """The name of the GPU, or of the processor with the number of cores."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    return f"{moto.cores()} cores of {name} ({torch.backends.cpu.get_cpu_capability()})"


def gpu_memory_gb(device):
    """The most GPU memory that tensors held at once, in GiB; zero on a CPU."""
    used = torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else 0
    return round(used / 2 ** 30, 2)


def peak_memory_gb():
    """The largest resident memory this process ever had, in GiB; None on Windows."""
    with contextlib.suppress(ImportError):
        import resource
        unit = 2 ** 20 if sys.platform.startswith("linux") else 2 ** 30
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)


def synthetic_replay(cfg, episodes):
    """A replay of random images, actions and rewards, for timing alone."""
    L, P, A, rng = cfg.episode_steps, cfg.image_size, 4, np.random.default_rng(0)
    store = moto.Replay(episodes * (L + 1), P, A, cfg.device)
    for _ in range(episodes):
        store.add({"image": rng.integers(0, 256, (L + 1, P, P, 3), np.uint8), "terminal": False,
                   "action": rng.uniform(-0.9, 0.9, (L, A)).astype(np.float32),
                   "reward": (rng.random(L) < 0.1).astype(np.float32)})
    return store


def learner(cfg, compiled=False, warm=3, stage=3):
    """An agent, and a call that updates it once on synthetic data, as in one of the three stages:
    the behaviour prior, the rest offline, online; some updates warm it up."""
    cfg = dataclasses.replace(cfg, warmup=0)
    agent = moto.MOTO(cfg, 4, False, cfg.device, compiled)
    store, rng = synthetic_replay(cfg, 10), np.random.default_rng(0)
    agent.episodes = int(stage == 3)
    if stage > 1:
        store.encode(agent.ema_policy)
    update = lambda: agent.update(moto.sample_batch(cfg, rng, store))
    for _ in range(warm):
        update()
    return agent, update


def bench_forms(cfg, repeat=15):
    """Updates per second and share of the measured peak, of the plain float32 form, of this config
    without compiling, and of it compiled. Their updates take turns. Returns operations per update,
    and the rows."""
    plain = dataclasses.replace(cfg, precision="float32")
    forms, calls, start = {"plain": (plain, False), "eager": (cfg, False)}, {}, {}
    if cfg.device.startswith("cuda"):
        forms["compiled"] = cfg, True
    for name, (form, compiled) in forms.items():
        started = time.perf_counter()
        calls[name] = learner(form, compiled)[1]
        start[name] = time.perf_counter() - started
    count, timings = flops(calls["plain"]), medians(calls, repeat, cfg.device)
    peak = {form.precision: measured_peak(form) for form in (plain, cfg)}
    return count, {name: {
        "precision": form.precision, "updates_per_second": 1 / timings[name],
        "speedup_over_eager_fp32": timings["plain"] / timings[name],
        "peak_gflops": peak[form.precision] / 1e9,
        "fraction_of_peak": count / timings[name] / peak[form.precision],
        "seconds_to_start": start[name]} for name, (form, _) in forms.items()}


def bench_parts(cfg, repeat=10):
    """Milliseconds and operations of an update in each of the three stages, and of its parts
    (forward and backward), eager."""
    (agent, update), store = learner(cfg), synthetic_replay(cfg, 10)
    rng, policy, device = np.random.default_rng(0), agent.ema_policy, cfg.device
    images = moto.sample_batch(cfg, rng, store)
    store.encode(policy)
    sample = lambda: moto.sample_batch(cfg, rng, store)
    batch = sample()
    decisions = batch.pop("decisions")
    feat, last = agent.filter(decisions)
    batch["x"] = moto.to_image(batch["image"])

    def both_ways(forward, autocast=contextlib.nullcontext):
        def call():
            with autocast():
                loss = forward()
            loss.backward()
        return call

    def optimisers():
        for name, optimiser in agent.optimisers.items():
            nn.utils.clip_grad_norm_(agent.modules[name].parameters(), moto.GRAD_CLIP)
            optimiser.step()
        moto.update_target(agent.target, agent.critic, cfg.target_rate)
        policy.update_ema(actor=agent.actor)

    calls = {
        "data": sample,
        "behaviour prior": both_ways(lambda: agent.losses(
            *agent.encode_frames(images))[0], agent.autocast),
        "model": both_ways(lambda: agent.model_terms(batch)[0], agent.autocast),
        "filter": lambda: agent.filter(decisions),
        "imagination": lambda: agent.expand(feat, last["e"][:, -1]),
        "critic": both_ways(lambda: agent.critic_terms(feat, last)[0]),
        "actor": both_ways(lambda: agent.actor_terms(last["e"][:, 0], cfg.beta)[0]),
        "optimisers": optimisers,
        "update of the prior": learner(cfg, stage=1)[1],
        "offline update": learner(cfg, stage=2)[1], "online update": update}
    medians(calls, 2, device)
    ms = {name: 1e3 * seconds for name, seconds in medians(calls, repeat, device).items()}
    gflop = {name: flops(call) / 1e9 for name, call in calls.items()}
    for values in ms, gflop:
        values["critic"] -= values["imagination"]
    return {name: {"ms": ms[name], "gflop": gflop[name]} for name in calls}


def bench_growth(cfg, repeat=4):
    """Milliseconds per update at half, at once and at twice each size, the others as configured;
    and per sampled batch with 10, 100 and 1,000 episodes in the replay."""
    table = {}
    for label, names in {"batch B": ["batch"], "sequence length T": ["length"],
                         "ensemble K": ["ensemble"], "horizon H": ["horizon"],
                         "width": ["channels", "deter", "stoch", "hidden"]}.items():
        calls = {}
        for factor in (0.5, 1, 2):
            least = {"length": cfg.hold + moto.FRAMES, "horizon": 0}
            sizes = {name: max(least.get(name, 1), round(factor * getattr(cfg, name)))
                     for name in names}
            calls[f"{factor:g}x"] = learner(dataclasses.replace(cfg, **sizes), warm=1)[1]
        timings = medians(calls, repeat, cfg.device)
        table[label] = {size: 1e3 * seconds for size, seconds in timings.items()}
    rng, calls = np.random.default_rng(0), {}
    for episodes in (10, 100, 1000):
        store = synthetic_replay(cfg, episodes)
        calls[f"{episodes} episodes"] = (
            lambda store=store: store.sample(rng, cfg.batch, cfg.length))
    timings = medians(calls, 30, cfg.device)
    return table | {"sampling": {size: 1e3 * seconds for size, seconds in timings.items()}}


def default_env(env):
    """The scene of `env` as Gymnasium renders it by default. `env` can then render no more: two
    OpenGL contexts in one process slow each other down."""
    if not hasattr(env, "camera"):
        return env.env
    env.camera.close()
    if not hasattr(env.env, "seeded_rand_vec"):           # not Meta-World
        import gymnasium
        default = gymnasium.make("FrankaKitchen-v1", render_mode="rgb_array")
        default.reset(seed=0)
    else:
        default = type(env.env)(seed=0, render_mode="rgb_array")
        default.seeded_rand_vec, default._freeze_rand_vec = True, False
        default.reset()
    return default


def bench_env(cfg, steps=100):
    """Steps per second of the simulator with its picture, and milliseconds per picture, ours and
    default."""
    env = moto.make_env(cfg)
    env.reset([0, 0, 0])
    still = np.zeros(env.action_size, np.float32)
    calls = {"step": lambda: env.step(still), "ours": env.render}
    step, ours = medians(calls, steps, "cpu").values()
    default = default_env(env)
    default.render()
    usual, = medians({"default": default.render}, steps // 2, "cpu").values()
    default.close()
    env.close()
    return {"env_steps_per_second": 1 / step, "render_ms": 1e3 * ours,
            "default_render_ms": 1e3 * usual, "render_speedup": usual / ours}


def bench(cfg):
    """Measure this config on this machine -> a dict, numbers rounded to four digits.

    Raises UserError for the model-free baselines, whose updates have none of these parts.
    """
    if cfg.variant in moto.AGENTS:
        raise moto.UserError(f"the bench measures the parts of MOTO; {cfg.variant} has none of "
                           "them: choose another --variant")
    learner(cfg)
    result = {"machine": machine(cfg.device), "torch": torch.__version__,
              "threads": torch.get_num_threads(), "preset": cfg.preset, "device": cfg.device,
              "precision": cfg.precision, "peak_memory_gb": peak_memory_gb(),
              "gpu_memory_gb": gpu_memory_gb(cfg.device)}
    stages = {"forms": bench_forms, "parts": bench_parts, "growth": bench_growth, "env": bench_env}
    for name, stage in tqdm(stages.items(), desc="bench", leave=False):
        result[name] = stage(cfg)
    count, forms = result["forms"]
    best = max(forms, key=lambda name: forms[name]["updates_per_second"])
    result |= {"gflop_per_update": count / 1e9, "forms": forms, "form": best}
    result |= forms[best] | result.pop("env")
    return json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.4g}"))


def as_table(r):
    """The result of `bench` as a table to read."""
    lines = [f"{r['machine']}, torch {r['torch']}, {r['threads']} threads",
             f"preset {r['preset']}, {r['precision']}, "
             f"{r['gflop_per_update']:.1f} GFLOP per update", "",
             f"{'form':28}{'updates/s':>10}{'of peak':>9}{'speed-up':>10}{'start, s':>10}"]
    for name, f in r["forms"].items():
        lines.append(f"{name + ', ' + f['precision']:28}{f['updates_per_second']:10.2f}"
                     f"{f['fraction_of_peak']:9.0%}{f['speedup_over_eager_fp32']:9.2f}x"
                     f"{f['seconds_to_start']:10.1f}   (peak: {f['peak_gflops']:.0f} GFLOP/s)")
    lines += ["", f"{'part (eager)':28}{'ms':>10}{'GFLOP':>9}"]
    for name, part in r["parts"].items():
        lines.append(f"{name:28}{part['ms']:10.1f}{part['gflop']:9.2f}")
    lines += ["", "growth (ms; the first five: per update, eager; the last: per sampled batch)"]
    for name, row in r["growth"].items():
        sizes = [f"{size}: {ms:.3g}" for size, ms in row.items()]
        lines.append(f"{name:28}" + "   ".join(sizes))
    lines += ["", f"simulator: {r['env_steps_per_second']:.0f} steps/s with pictures; a picture "
              f"takes {r['render_ms']:.2f} ms, by default {r['default_render_ms']:.1f}: "
              f"{r['render_speedup']:.1f} times faster",
              f"peak memory: {r['peak_memory_gb']} GB, of a GPU {r['gpu_memory_gb']} GB"]
    return "\n".join(lines)


def main(argv=None):
    """Returns the exit code: 0 done, 2 bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="bench.py", usage="bench.py [--FLAG VALUE ...] [--json]", allow_abbrev=False,
        description=__doc__.split("\n\n")[0], epilog="FLAG: see python moto.py --help")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options, rest = parser.parse_known_args(argv)
    try:
        given = moto.parse(rest)
        if "evaluate" in given:
            raise moto.UserError("--evaluate is for moto.py, not for the bench")
        result = bench(moto.build_config(**given))
        print(json.dumps(result, indent=1) if options.json else as_table(result))
    except moto.UserError as trouble:
        print(f"moto: {trouble}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
